//! One connection: messages in, actions carried out on memory, rings and device, replies out.
//!
//! Everything happens on the calling thread, one message after the other: the protocol has no
//! concurrency, and what could block (a ring that drains) has to be waited for anyway before the
//! reply may be sent.
//!
//! # What a failed request gets
//!
//! | what failed | answer | then |
//! |---|---|---|
//! | framing: version, flags, length of the body over the limit, too many descriptors | none | the connection ends: nobody knows where the next message starts |
//! | GET_CONFIG | a reply without body (specification, GET_CONFIG) | goes on |
//! | another request that has a reply of its own | none: the reply has no room for "no" | ends |
//! | any request with NEED_REPLY, REPLY_ACK negotiated | acknowledgement with 1 | goes on |
//! | what the *guest* may have caused: a ring that does not start, a refused write to the configuration | none | goes on: a guest that breaks one queue loses that queue |
//! | everything else | none | ends: the frontend believes something that is not so |
//! | the device cannot serve (Device::start) | acknowledgement with 1, if asked | ends |
//! | a queue thread is gone | as above | ends, and [`super::Backend::serve`] returns the error |
//!
//! A connection that ends stops its rings, waits for their requests and stops the device; the
//! process and its other state live on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;

use super::config_change::ConfigChangeNotifier;
use super::message::{Header, MessageError, Request, encode_reply};
use super::protocol::{Action, Protocol, Refusal, Reply};
use super::socket::{Message, Socket, SocketError};
use crate::device::{Device, DeviceError};
use crate::inflight::{InflightError, InflightRegion};
use crate::memory::{GuestMemory, MemoryError, MemoryMap};
use crate::worker::{QueueThread, RingConfig, WorkerError};

/// What a connection wants of a queue's thread; a seam for tests.
pub(super) trait Queue {
    fn start(&self, ring: RingConfig) -> Result<(), WorkerError>;
    fn stop(&self) -> Result<u16, WorkerError>;
    fn set_kick(&self, fd: Option<OwnedFd>);
    fn set_call(&self, fd: Option<OwnedFd>);
    fn set_err(&self, fd: Option<OwnedFd>);
    fn set_enabled(&self, enabled: bool);
    fn set_memory(&self, memory: Arc<GuestMemory>);
}

impl Queue for QueueThread {
    fn start(&self, ring: RingConfig) -> Result<(), WorkerError> {
        Self::start(self, ring)
    }

    fn stop(&self) -> Result<u16, WorkerError> {
        Self::stop(self)
    }

    fn set_kick(&self, fd: Option<OwnedFd>) {
        Self::set_kick(self, fd);
    }

    fn set_call(&self, fd: Option<OwnedFd>) {
        Self::set_call(self, fd);
    }

    fn set_err(&self, fd: Option<OwnedFd>) {
        Self::set_err(self, fd);
    }

    fn set_enabled(&self, enabled: bool) {
        Self::set_enabled(self, enabled);
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) {
        Self::set_memory(self, memory);
    }
}

/// Why a request was not carried out.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error("the device refuses a new in-flight region: {0}")]
    InflightCreate(DeviceError),
    #[error("the device refuses the write to its configuration: {0}")]
    Config(DeviceError),
    #[error("the device refuses the MTU: {0}")]
    Mtu(DeviceError),
    #[error("the device cannot serve this frontend: {0}")]
    Device(DeviceError),
    #[error(transparent)]
    Queue(#[from] WorkerError),
    #[error("cannot duplicate a file descriptor of the frontend's")]
    Duplicate(#[source] io::Error),
}

/// How a failed request is dealt with; see the table in the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Severity {
    /// May be the guest's doing: never a reason to end the connection.
    Guest,
    /// The frontend's doing: ends the connection unless the frontend can be told.
    Frontend,
    /// Nothing can be served: ends the connection.
    Fatal,
}

impl RequestError {
    fn severity(&self) -> Severity {
        match self {
            Self::Config(_) | Self::Queue(WorkerError::Ring { .. }) => Severity::Guest,
            Self::Message(_)
            | Self::Refused(_)
            | Self::Memory(_)
            | Self::Inflight(_)
            | Self::InflightCreate(_)
            | Self::Mtu(_) => Severity::Frontend,
            Self::Device(_) | Self::Queue(_) | Self::Duplicate(_) => Severity::Fatal,
        }
    }
}

/// How a connection ended.
#[derive(Debug, Error)]
pub(super) enum End {
    /// The frontend closed the socket; the normal end.
    #[error("the frontend has left")]
    Left,
    #[error("stopped")]
    Stopped,
    /// The stream cannot be followed.
    #[error(transparent)]
    Socket(SocketError),
    /// A request failed, and going on would be wrong.
    #[error("request {request} failed: {source}")]
    Request { request: u32, source: RequestError },
}

impl From<SocketError> for End {
    fn from(error: SocketError) -> Self {
        match error {
            SocketError::Left => Self::Left,
            SocketError::Stopped => Self::Stopped,
            other => Self::Socket(other),
        }
    }
}

/// A connected frontend and what it has set up.
pub(super) struct Connection<'a, D, Q> {
    socket: Socket<'a>,
    device: &'a D,
    queues: &'a [Q],
    notifier: &'a ConfigChangeNotifier,
    /// Told what failed without ending the connection.
    report: &'a mut dyn FnMut(u32, &RequestError),
    protocol: Protocol,
    memory: MemoryMap,
    inflight: Option<InflightRegion>,
    /// Made for GET_INFLIGHT_FD and not sent yet.
    new_inflight: Option<InflightRegion>,
    /// A backend channel that nothing may be sent on. Kept open: QEMU reports an error when we
    /// close it.
    unused_channel: Option<OwnedFd>,
    /// Does Device::start have to be called before the next ring starts?
    needs_device_start: bool,
}

impl<'a, D: Device, Q: Queue> Connection<'a, D, Q> {
    pub(super) fn new(
        socket: Socket<'a>,
        device: &'a D,
        queues: &'a [Q],
        notifier: &'a ConfigChangeNotifier,
        protocol: Protocol,
        report: &'a mut dyn FnMut(u32, &RequestError),
    ) -> Self {
        Self {
            socket,
            device,
            queues,
            notifier,
            report,
            protocol,
            memory: MemoryMap::new(),
            inflight: None,
            new_inflight: None,
            unused_channel: None,
            needs_device_start: true,
        }
    }

    /// Serves until the frontend leaves, the stop, or an error; then stops rings and device.
    pub(super) fn run(mut self) -> End {
        let end = loop {
            let next = self.socket.receive().map_err(End::from);
            if let Err(end) = next.and_then(|message| self.serve(message)) {
                break end;
            }
        };
        self.finish(end)
    }

    fn finish(self, end: End) -> End {
        let mut end = end;
        self.notifier.disconnect();
        for queue in self.protocol.running().collect::<Vec<_>>() {
            let Some(thread) = self.queue(queue) else {
                continue;
            };
            match thread.stop() {
                // A start that was still to come when the connection ended.
                Ok(_) | Err(WorkerError::NotRunning { .. }) => {}
                Err(error) => {
                    end = End::Request {
                        request: FrontendReq::GET_VRING_BASE.into(),
                        source: error.into(),
                    };
                }
            }
        }
        for thread in self.queues {
            thread.set_err(None);
        }
        // Also when no ring ever ran: the device may hold what GET_INFLIGHT_FD made it take.
        self.device.stop();
        end
    }

    fn serve(&mut self, message: Message) -> Result<(), End> {
        let Message { header, body, fds } = message;
        let outcome = Request::parse(&header, &body, fds)
            .map_err(RequestError::from)
            .and_then(|request| self.carry_out(request));
        match outcome {
            Ok(reply) => self.reply(&header, reply),
            Err(error) => self.refuse(&header, error),
        }
    }

    fn carry_out(&mut self, request: Request) -> Result<Reply, RequestError> {
        let reply = self.protocol.handle(request)?;
        let mut failed = None;
        while let Some(action) = self.protocol.next_action() {
            match self.perform(action) {
                Ok(()) => {}
                // This ring is lost; others that are to start may be sound.
                Err(error) if error.severity() == Severity::Guest => failed = Some(error),
                Err(error) => {
                    self.protocol.drop_actions();
                    return Err(error);
                }
            }
        }
        failed.map_or(Ok(reply), Err)
    }

    fn perform(&mut self, action: Action) -> Result<(), RequestError> {
        match action {
            Action::SetFeatures(features) => self.device.set_features(features),
            Action::SetMtu(mtu) => self.device.set_mtu(mtu).map_err(RequestError::Mtu)?,
            Action::ReplaceMemory(regions) => {
                self.memory = MemoryMap::from_regions(regions)?;
                self.protocol.memory_changed(self.memory.regions());
            }
            // QEMU before 8.1 tells of memory once for each queue pair of a network device.
            Action::AddRegion(region, _) if self.memory.regions().contains(&region) => {}
            Action::AddRegion(region, fd) => {
                self.memory.add(region, fd)?;
                self.protocol.memory_changed(self.memory.regions());
            }
            // And once for each pair that it is gone.
            Action::RemoveRegion(region) if self.memory.was_removed(&region) => {}
            Action::RemoveRegion(region) => {
                self.memory
                    .remove(region.guest_phys_addr, region.size, region.userspace_addr)?;
                self.protocol.memory_changed(self.memory.regions());
            }
            Action::UpdateMemory(queue) => {
                if let Some(thread) = self.queue(queue) {
                    thread.set_memory(Arc::clone(self.memory.memory()));
                }
            }
            Action::StartRing(queue) => {
                let started = self.start_ring(queue);
                if started.is_err() {
                    self.protocol.ring_failed(queue);
                }
                started?;
            }
            Action::StopRing(queue) => {
                if let Some(thread) = self.queue(queue) {
                    let base = thread.stop()?;
                    self.protocol.ring_stopped(queue, base);
                    // A ring whose memory moved is to start again and still counts as running.
                    if self.protocol.running().next().is_none() {
                        self.device.rings_stopped();
                    }
                }
            }
            Action::SetEnabled(queue) => {
                if let (Some(thread), Some(ring)) = (self.queue(queue), self.protocol.ring(queue)) {
                    thread.set_enabled(ring.enabled);
                }
            }
            Action::SetKick(queue) => {
                if let (Some(thread), Some(ring)) = (self.queue(queue), self.protocol.ring(queue)) {
                    thread.set_kick(duplicate(ring.kick.as_ref().and_then(Option::as_ref))?);
                }
            }
            Action::SetCall(queue) => {
                if let (Some(thread), Some(ring)) = (self.queue(queue), self.protocol.ring(queue)) {
                    thread.set_call(duplicate(ring.call.as_ref())?);
                }
            }
            Action::SetErr(queue, fd) => {
                if let Some(thread) = self.queue(queue) {
                    thread.set_err(fd);
                }
            }
            Action::CreateInflight {
                num_queues,
                queue_size,
            } => {
                let extra_len = self.device.inflight_extra_len();
                let region = InflightRegion::create(num_queues, queue_size, extra_len)?;
                self.device
                    .inflight_create(&region.extra())
                    .map_err(RequestError::InflightCreate)?;
                self.new_inflight = Some(region);
            }
            Action::SetInflight(area, fd) => {
                self.inflight = Some(InflightRegion::from_fd(
                    fd,
                    area.mmap_size,
                    area.mmap_offset,
                    area.num_queues,
                    area.queue_size,
                    self.device.inflight_extra_len(),
                )?);
                self.needs_device_start = true;
            }
            Action::SetBackendChannel(fd) => {
                if self.protocol.has_config() {
                    self.notifier.connect(fd);
                } else {
                    self.unused_channel = Some(fd);
                }
            }
            Action::WriteConfig { offset, data } => self
                .device
                .write_config(offset, &data)
                .map_err(RequestError::Config)?,
        }
        Ok(())
    }

    fn start_ring(&mut self, queue: u16) -> Result<(), RequestError> {
        if self.needs_device_start {
            let extra = self.inflight.as_ref().map(InflightRegion::extra);
            self.device.start(extra).map_err(RequestError::Device)?;
            self.needs_device_start = false;
        }
        let (Some(thread), Some(ring)) = (self.queue(queue), self.protocol.ring(queue)) else {
            return Ok(());
        };
        let Some(place) = ring.running else {
            return Ok(());
        };
        thread.start(RingConfig {
            size: ring.size,
            desc_table: place.desc_table,
            avail_ring: place.avail_ring,
            used_ring: place.used_ring,
            base: ring.base,
            features: self.protocol.features(),
            kick: duplicate(ring.kick.as_ref().and_then(Option::as_ref))?,
            call: duplicate(ring.call.as_ref())?,
            memory: Arc::clone(self.memory.memory()),
            inflight: self
                .inflight
                .as_ref()
                .and_then(|region| region.queue(queue)),
            enabled: ring.enabled,
        })?;
        Ok(())
    }

    fn queue(&self, queue: u16) -> Option<&'a Q> {
        self.queues.get(usize::from(queue))
    }

    fn reply(&mut self, header: &Header, reply: Reply) -> Result<(), End> {
        let request = header.request;
        match reply {
            Reply::Ack => {
                self.acknowledge(header, 0)?;
            }
            Reply::U64(value) => self.send(request, &value.to_ne_bytes(), None)?,
            Reply::VringBase(queue) => {
                let base = self.protocol.ring(queue).map_or(0, |ring| ring.base);
                let mut body = u32::from(queue).to_ne_bytes().to_vec();
                body.extend_from_slice(&u32::from(base).to_ne_bytes());
                self.send(request, &body, None)?;
            }
            Reply::Config(range) => {
                let mut body = Vec::new();
                for field in [range.offset, range.len, range.flags] {
                    body.extend_from_slice(&field.to_ne_bytes());
                }
                // Frontends ask for as much as the newest standard has: zeros behind what we have.
                let config = self.device.config();
                let rest = config.iter().copied().skip(range.offset as usize);
                body.extend(rest.chain(std::iter::repeat(0)).take(range.len as usize));
                self.send(request, &body, None)?;
            }
            Reply::Inflight { body_len } => {
                let Some(region) = self.new_inflight.take() else {
                    return Ok(());
                };
                let mut body = Vec::new();
                body.extend_from_slice(&region.mmap_size().to_ne_bytes());
                body.extend_from_slice(&region.mmap_offset().to_ne_bytes());
                body.extend_from_slice(&region.num_queues().to_ne_bytes());
                body.extend_from_slice(&region.queue_size().to_ne_bytes());
                body.resize(body_len, 0);
                self.send(request, &body, Some(region.fd()))?;
            }
        }
        Ok(())
    }

    fn refuse(&mut self, header: &Header, error: RequestError) -> Result<(), End> {
        let request = header.request;
        let severity = error.severity();
        let told = match kind(request) {
            Kind::GetConfig => {
                self.send(request, &[], None)?;
                true
            }
            Kind::OwnReply => false,
            Kind::Ack => self.acknowledge(header, 1)?,
        };
        if severity == Severity::Guest || (severity == Severity::Frontend && told) {
            (self.report)(request, &error);
            return Ok(());
        }
        Err(End::Request {
            request,
            source: error,
        })
    }

    /// Sends an acknowledgement if one is wanted; says whether it did.
    fn acknowledge(&self, header: &Header, value: u64) -> Result<bool, End> {
        let wanted = header.needs_reply && self.protocol.has_reply_ack();
        if wanted {
            self.send(header.request, &value.to_ne_bytes(), None)?;
        }
        Ok(wanted)
    }

    fn send(&self, request: u32, body: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), End> {
        Ok(self.socket.send(&encode_reply(request, body), fd)?)
    }
}

/// What kind of answer a request has.
enum Kind {
    /// A reply of its own, where an empty one means "no".
    GetConfig,
    /// A reply of its own.
    OwnReply,
    /// An acknowledgement, if asked for.
    Ack,
}

fn kind(request: u32) -> Kind {
    use FrontendReq as R;
    match R::try_from(request) {
        Ok(R::GET_CONFIG) => Kind::GetConfig,
        Ok(
            R::GET_FEATURES
            | R::GET_PROTOCOL_FEATURES
            | R::GET_QUEUE_NUM
            | R::GET_MAX_MEM_SLOTS
            | R::GET_VRING_BASE
            | R::GET_INFLIGHT_FD,
        ) => Kind::OwnReply,
        _ => Kind::Ack,
    }
}

fn duplicate(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, RequestError> {
    fd.map(|fd| fd.as_fd().try_clone_to_owned())
        .transpose()
        .map_err(RequestError::Duplicate)
}

#[cfg(test)]
mod tests;
