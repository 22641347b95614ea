//! The server: one thread, one `poll`, sockets that never block.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use serde_json::{Value, json};

use super::events::EventSender;
use super::protocol::{ControlError, ControlErrorKind, parse_request};
use super::session::Session;
use crate::cli::{SocketError, SocketFile, bind_socket};
use crate::stop::{StopSignal, timespec};
use crate::telemetry::{RateLimited, Registry, shown};

/// Clients served at once; one more is told to come back later.
pub const MAX_CONNECTIONS: usize = 16;

/// The method that subscribes.
const EVENTS: &str = "events";

/// How long the listener is left alone after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The path could not be bound.
    #[error("cannot open the control socket")]
    Socket(#[from] SocketError),
    /// No thread or no descriptor is to be had.
    #[error("cannot start the control socket's thread")]
    Thread(#[source] io::Error),
}

/// What goes on with a client's connection once the answer is on its way.
pub type Takeover = Box<dyn FnOnce(UnixStream) + Send>;

type Plain = Arc<dyn Fn(Value) -> Result<Value, ControlError> + Send + Sync>;
type Upgrade = Arc<dyn Fn(Value) -> Result<(Value, Takeover), ControlError> + Send + Sync>;

enum Method {
    Plain(Plain),
    Upgrade(Upgrade),
}

/// Somebody who is connected.
struct Client {
    stream: UnixStream,
    session: Session,
    /// Gets the stream as soon as the answer that announces it is taken.
    takeover: Option<Takeover>,
}

impl Client {
    fn is_taken_over(&self) -> bool {
        self.takeover.is_some() && !self.session.wants_output()
    }
}

/// A control socket that is bound and not yet served, so that a process can bind early, give up
/// its privileges, and then start threads.
pub struct ControlServer {
    listener: UnixListener,
    file: SocketFile,
    methods: BTreeMap<&'static str, Method>,
    events: EventSender,
}

impl fmt::Debug for ControlServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlServer")
            .field("file", &self.file)
            .field("methods", &self.methods.keys())
            .finish_non_exhaustive()
    }
}

impl ControlServer {
    /// Binds `path` with mode 0600, replacing a stale socket, and registers `ping`, `version`
    /// (`{"name", "version"}`), `stats` and `metrics` of `registry`, and `methods`.
    ///
    /// # Errors
    /// The path is taken or cannot be bound.
    pub fn bind(
        path: &Path,
        name: &'static str,
        version: &'static str,
        registry: &Registry,
    ) -> Result<Self, ServeError> {
        let (listener, file) = bind_socket(path, 0o600)?;
        listener.set_nonblocking(true).map_err(ServeError::Thread)?;
        let (stats, metrics) = (registry.clone(), registry.clone());
        Ok(Self {
            listener,
            file,
            methods: BTreeMap::new(),
            events: EventSender::new().map_err(ServeError::Thread)?,
        }
        .method("ping", |_| Ok(Value::Null))
        .method("version", move |_| {
            Ok(json!({ "name": name, "version": version }))
        })
        .method("stats", move |_| Ok(stats.snapshot()))
        .method("metrics", move |_| Ok(Value::String(metrics.prometheus()))))
    }

    /// Adds a method, or replaces one. It runs on the server's thread and must be quick.
    #[must_use]
    pub fn method(
        mut self,
        name: &'static str,
        method: impl Fn(Value) -> Result<Value, ControlError> + Send + Sync + 'static,
    ) -> Self {
        self.methods.insert(name, Method::Plain(Arc::new(method)));
        self
    }

    /// Adds a method that takes the client's connection over: once its result was sent, the
    /// connection, which does not block, is the [`Takeover`]'s and no longer counts as a client. What
    /// the client has sent behind the request is lost, so it has to wait for the answer.
    #[must_use]
    pub fn upgrade(
        mut self,
        name: &'static str,
        method: impl Fn(Value) -> Result<(Value, Takeover), ControlError> + Send + Sync + 'static,
    ) -> Self {
        self.methods.insert(name, Method::Upgrade(Arc::new(method)));
        self
    }

    /// Where events for its subscribed clients come from.
    #[must_use]
    pub fn events(&self) -> EventSender {
        self.events.clone()
    }

    /// Serves on a thread of its own, until `stop` or until the returned handle is dropped.
    ///
    /// # Errors
    /// No thread or no descriptor is to be had.
    pub fn spawn(mut self, stop: StopSignal) -> Result<ControlThread, ServeError> {
        let mut names: Vec<&str> = self.methods.keys().copied().collect();
        names.extend(["methods", EVENTS]);
        names.sort_unstable();
        let names = json!(names);
        self = self.method("methods", move |_| Ok(names.clone()));
        let dropped = StopSignal::new().map_err(ServeError::Thread)?;
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn({
                let dropped = dropped.clone();
                move || Loop::new(self, [stop, dropped]).run()
            })
            .map_err(ServeError::Thread)?;
        Ok(ControlThread {
            dropped,
            thread: Some(thread),
        })
    }
}

/// A control socket that is served. Dropping it ends the thread and removes the socket's file.
#[derive(Debug)]
pub struct ControlThread {
    dropped: StopSignal,
    thread: Option<JoinHandle<()>>,
}

impl Drop for ControlThread {
    fn drop(&mut self) {
        self.dropped.stop();
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by its own thread.
            let _ = thread.join();
        }
    }
}

struct Loop {
    server: ControlServer,
    stops: [StopSignal; 2],
    clients: Vec<Client>,
    accept_after: Option<Instant>,
    complaints: RateLimited,
}

impl Loop {
    fn new(server: ControlServer, stops: [StopSignal; 2]) -> Self {
        Self {
            server,
            stops,
            clients: Vec::new(),
            accept_after: None,
            complaints: RateLimited::new(5, Duration::from_secs(60)),
        }
    }

    fn run(mut self) {
        while !self.stops.iter().any(StopSignal::is_stopped) {
            let listener_ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "the control socket stops: poll failed");
                    return;
                }
            };
            let now = Instant::now();
            if listener_ready {
                self.accept(now);
            }
            self.tell(now);
            let methods = &self.server.methods;
            self.clients.retain_mut(|client| {
                serve(client, methods, now).is_ok() && !client.session.is_over(now)
            });
            for client in self.clients.extract_if(.., |client| client.is_taken_over()) {
                if let Some(takeover) = client.takeover {
                    takeover(client.stream);
                }
            }
        }
    }

    /// Hands new events to those who subscribed.
    fn tell(&mut self, now: Instant) {
        let mut slow = 0_usize;
        for line in self.server.events.take() {
            self.clients.retain_mut(|client| {
                let told = client.session.tell(&line, now);
                slow += usize::from(told.is_err());
                told.is_ok()
            });
        }
        if slow > 0 {
            self.complain(
                now,
                format_args!("{slow} clients were dropped: they do not take their events"),
            );
        }
    }

    /// Sleeps until something is to be done. Says whether someone wants to connect.
    fn wait(&self) -> io::Result<bool> {
        let now = Instant::now();
        let accepting = self.accept_after.is_none_or(|after| now >= after);
        let [stop, dropped] = self.stops.each_ref().map(StopSignal::fd);
        let events = self.server.events.fd();
        let mut fds = Vec::with_capacity(4 + self.clients.len());
        let listener_flags = if accepting {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        fds.push(PollFd::new(&self.server.listener, listener_flags));
        fds.push(PollFd::new(&stop, PollFlags::IN));
        fds.push(PollFd::new(&dropped, PollFlags::IN));
        fds.push(PollFd::new(&events, PollFlags::IN));
        for Client {
            stream, session, ..
        } in &self.clients
        {
            let flags = if session.wants_output() {
                PollFlags::OUT
            } else {
                PollFlags::IN
            };
            fds.push(PollFd::new(stream, flags));
        }
        let deadlines = self.clients.iter().map(|client| client.session.deadline());
        let pause = self.accept_after.filter(|_| !accepting);
        let timeout = deadlines
            .chain(pause)
            .min()
            .map(|deadline| timespec(deadline.saturating_duration_since(now)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(accepting && fds.first().is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn accept(&mut self, now: Instant) {
        self.accept_after = None;
        // A bound, so that a flood of clients cannot starve those that are there.
        for _ in 0..MAX_CONNECTIONS {
            let stream = match self.server.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.complain(now, format_args!("cannot accept a client: {error}"));
                    self.accept_after = Some(now + ACCEPT_PAUSE);
                    return;
                }
            };
            let session = match self.admit(&stream) {
                Ok(()) => Session::new(now),
                Err(error) => {
                    self.complain(now, format_args!("a client was refused: {error}"));
                    // One attempt to say why; these never take a place among the clients.
                    let refused = Session::refused(error, now);
                    let _ = (&stream).write(refused.output());
                    continue;
                }
            };
            self.clients.push(Client {
                stream,
                session,
                takeover: None,
            });
        }
    }

    fn admit(&self, stream: &UnixStream) -> Result<(), ControlError> {
        let refuse = |text: String| ControlError::new(ControlErrorKind::Refused, text);
        stream
            .set_nonblocking(true)
            .map_err(|error| refuse(error.to_string()))?;
        let peer = socket_peercred(stream)
            .map_err(|error| refuse(format!("cannot tell who you are: {error}")))?;
        let (peer, own) = (peer.uid.as_raw(), geteuid().as_raw());
        if !may_talk(peer, own) {
            return Err(refuse(format!(
                "user {peer} may not talk here, only root and user {own}"
            )));
        }
        if self.clients.len() >= MAX_CONNECTIONS {
            let text = format!("{MAX_CONNECTIONS} clients are connected; try again later");
            return Err(ControlError::new(ControlErrorKind::Busy, text));
        }
        Ok(())
    }

    fn complain(&mut self, now: Instant, what: fmt::Arguments<'_>) {
        if let Some(suppressed) = self.complaints.allow(now) {
            tracing::warn!(suppressed = shown(suppressed), "control socket: {what}");
        }
    }
}

fn may_talk(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == 0 || peer_uid == own_uid
}

/// Goes on with one client as far as it goes without waiting. An error ends it.
fn serve(
    client: &mut Client,
    methods: &BTreeMap<&'static str, Method>,
    now: Instant,
) -> io::Result<()> {
    let Client {
        stream,
        session,
        takeover,
    } = client;
    // One read a round, so that all clients have their turn; `poll` comes back at once.
    if session.wants_input() {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => session.feed(buffer.get(..n).unwrap_or_default(), now),
            Err(error) if is_not_yet(&error) => {}
            Err(error) => return Err(error),
        }
    }
    loop {
        while session.wants_output() {
            match stream.write(session.output()) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => session.sent(n, now),
                Err(error) if is_not_yet(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        if takeover.is_some() {
            return Ok(());
        }
        // What was read is at most a few hundred short requests, so this ends.
        let Some(line) = session.next_line(now) else {
            if session.wants_output() {
                continue;
            }
            return Ok(());
        };
        let response = answer(&line, methods, session, takeover).into();
        session.respond(&response, now);
    }
}

fn is_not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn answer(
    line: &[u8],
    methods: &BTreeMap<&'static str, Method>,
    session: &mut Session,
    takeover: &mut Option<Takeover>,
) -> Result<Value, ControlError> {
    let request = parse_request(line)?;
    if request.method == EVENTS {
        session.subscribe();
        return Ok(json!({ "subscribed": true }));
    }
    let method = methods.get(request.method.as_ref()).ok_or_else(|| {
        ControlError::new(
            ControlErrorKind::UnknownMethod,
            format!(
                "there is no method {:?}; \"methods\" lists them",
                request.method
            ),
        )
    })?;
    match method {
        Method::Plain(method) => method(request.params),
        Method::Upgrade(method) => {
            let (value, then) = method(request.params)?;
            *takeover = Some(then);
            Ok(value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_the_same_user_may_talk_and_nobody_else() {
        assert!(may_talk(0, 1000));
        assert!(may_talk(1000, 1000));
        assert!(!may_talk(1001, 1000));
        assert!(!may_talk(1000, 0));
    }
}
