//! Real QEMU, a real kernel, and QEMU's own storage daemon in the card's place: what the shim does
//! must hold with any vhost-user backend.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host_shim::guest::{self, Initrd};
use host_shim::host::{self, Binaries};
use host_shim::plan::{Env, Plan, plan};
use host_shim::spec;
use host_shim::supervise::{Console, End, Limits, Options, Vm};

const LONG: Duration = Duration::from_secs(120);

const SCRIPT: &str = r#"
echo "STAGE $STAGE"
case "$STAGE" in
write)
    /sbin/mke2fs -q -F -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt || { echo FAILED; exit; }
    head -c 1000000 /dev/urandom > /mnt/file
    sha256sum /mnt/file > /mnt/sum
    umount /mnt && echo WRITTEN
    ;;
verify)
    cat /sys/block/vda/serial; echo
    mount -t ext4 /dev/vda /mnt && sha256sum -c /mnt/sum && umount /mnt && echo VERIFIED
    ;;
wait)
    dd if=/dev/vda of=/dev/null bs=4k count=1 2>/dev/null && echo WAITING
    while true; do
        sleep 0.2
        dd if=/dev/vda of=/dev/null iflag=direct bs=4k count=1 2>/dev/null && echo ALIVE
    done
    ;;
esac
"#;

struct Stage {
    dir: tempfile::TempDir,
    log: Arc<Mutex<Vec<String>>>,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = guest::kernel(&guest::cache_dir()).unwrap();
        let initrd = Initrd {
            modules: &guest::MODULES,
            programs: &["mke2fs"],
            files: &[],
            script: SCRIPT,
        };
        std::fs::write(dir.path().join("initrd"), initrd.build(&kernel).unwrap()).unwrap();
        std::os::unix::fs::symlink(&kernel.image, dir.path().join("vmlinuz")).unwrap();
        let image = std::fs::File::create(dir.path().join("disk.raw")).unwrap();
        image.set_len(64 << 20).unwrap();
        Self {
            dir,
            log: Arc::default(),
        }
    }

    fn plan(&self, stage: &str, binaries: &Binaries) -> Plan {
        let cmdline = guest::CMDLINE;
        let text = format!(
            "[vm]\nname = \"boot\"\nmemory = \"256M\"\naccel = \"tcg\"\nkernel = \"vmlinuz\"\n\
             initrd = \"initrd\"\ncmdline = \"{cmdline} STAGE={stage}\"\n\
             [[disk]]\nvolume = \"disk.raw\"\nkey-file = \"unused\"\n\
             [run]\ndir = \"run\"\nstop-timeout = 1\n"
        );
        let spec = spec::parse(&text, &self.dir.path().join("vm.toml")).unwrap();
        let env = Env {
            qemu: host::find_qemu(binaries).expect("QEMU: see .ci/debian-packages"),
            card: Some("/unused".into()),
            net_card: None,
            run_dir: self.dir.path().join("run"),
            networks_dir: None,
            kvm: None,
            card_user: None,
        };
        let mut plan = plan(&spec, &env).unwrap();
        for card in &mut plan.cards {
            card.process.program = "qemu-storage-daemon".into();
            card.process.args = storage_daemon(&self.dir.path().join("disk.raw"), &card.socket);
        }
        plan
    }

    fn start(&self, plan: Plan) -> (Vm, Console) {
        let console = Console::default();
        let log = Arc::clone(&self.log);
        let options = Options {
            console: Box::new(console.clone()),
            input: None,
            log: Arc::new(move |who, line| log.lock().unwrap().push(format!("{who}: {line}"))),
            limits: Limits::default(),
        };
        (Vm::start(plan, options).unwrap(), console)
    }

    /// Runs a stage to its end and returns its console.
    fn run(&self, stage: &str, binaries: &Binaries) -> String {
        let (vm, console) = self.start(self.plan(stage, binaries));
        let Ok(outcome) = vm.wait_timeout(LONG) else {
            panic!(
                "{stage} hangs: {}\n{:?}",
                console.text(),
                self.log.lock().unwrap()
            );
        };
        let text = console.text();
        assert_eq!(outcome.end, End::GuestPoweredOff, "{outcome:?}\n{text}");
        assert!(outcome.is_success(), "{outcome:?}\n{text}");
        text
    }
}

fn storage_daemon(image: &Path, socket: &Path) -> Vec<String> {
    let (image, socket) = (image.display(), socket.display());
    [
        "--blockdev".to_owned(),
        format!("driver=file,node-name=file,filename={image}"),
        "--blockdev".to_owned(),
        "driver=raw,node-name=disk,file=file".to_owned(),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on"
        ),
    ]
    .to_vec()
}

fn write_then_verify(binaries: &Binaries) {
    let stage = Stage::new();
    let written = stage.run("write", binaries);
    assert!(written.contains("WRITTEN"), "{written}");
    let verified = stage.run("verify", binaries);
    assert!(verified.contains("VERIFIED"), "{verified}");
}

#[test]
fn a_guest_finds_after_a_power_cycle_what_it_wrote() {
    write_then_verify(&Binaries::default());
}

/// `OFFLOAD_QEMU` names another QEMU to try, `OFFLOAD_QEMU_DATA` its firmware folders, with colons.
#[test]
fn another_qemu_runs_the_same_plan() {
    let Some(qemu) = std::env::var_os("OFFLOAD_QEMU") else {
        return;
    };
    let data = std::env::var_os("OFFLOAD_QEMU_DATA").unwrap_or_default();
    write_then_verify(&Binaries {
        qemu: Some(PathBuf::from(qemu)),
        qemu_data: std::env::split_paths(&data).collect(),
        card_dir: None,
    });
}

#[test]
fn a_backend_killed_under_a_guest_is_started_again_and_the_guest_reads_on() {
    let stage = Stage::new();
    let (vm, console) = stage.start(stage.plan("wait", &Binaries::default()));
    assert!(console.wait_for("ALIVE", LONG), "{}", console.text());
    let pid = vm.card_pid(0).unwrap();
    let killed = Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    let before = console.text().matches("ALIVE").count();
    let end = std::time::Instant::now() + LONG;
    while console.text().matches("ALIVE").count() < before + 3 {
        assert!(std::time::Instant::now() < end, "{}", console.text());
        std::thread::sleep(Duration::from_millis(50));
    }
    // This guest has no driver for the power button: QEMU is told to quit after a second.
    vm.stopper().stop();
    let outcome = vm.wait_timeout(LONG).map_err(|_| "hangs").unwrap();
    assert_eq!(
        (outcome.end, outcome.restarts),
        (End::Stopped, 1),
        "{outcome:?}"
    );
    assert!(outcome.is_success(), "{outcome:?}");
}
