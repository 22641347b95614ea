//! A guest of a few bytes: counts down and halts.

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes as _, VolatileMemory as _, VolatileMemoryError};

const MEMORY_BYTES: usize = 64 << 10;
const CODE: usize = 0x1000;
const STACK: u64 = 0x8000;
const GDT: usize = 0x5000;
/// Three levels of page tables, a page each, starting here.
const PAGE_TABLES: usize = 0x9000;

/// Iterations of the first and of the longest loop; each is two instructions.
const SHORTEST: u32 = 1_000;
const LONGEST: u32 = 16_000_000;
/// A loop that took this long is measured well enough.
const LONG_ENOUGH: Duration = Duration::from_millis(4);

/// CPU mode that the loop runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 16 bit, no paging: firmware and boot sectors.
    Real,
    /// 64 bit with paging, privilege level 0: kernels.
    Long,
}

/// Why no instruction could be run.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// An ioctl, or opening the device, failed.
    #[error("{what}: {source}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: kvm_ioctls::Error,
    },
    /// The guest's memory cannot be had.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::mmap::MmapRegionError),
    /// The guest's memory cannot be written.
    #[error("guest memory: {0}")]
    Write(#[from] VolatileMemoryError),
    /// The loop did not end in `hlt`.
    #[error("the guest stopped with {0} instead of halting")]
    WrongExit(String),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MeasureError {
    move |source| MeasureError::Kvm { what, source }
}

/// Instructions per second in `mode`.
pub(super) fn rate(mode: Mode) -> Result<f64, MeasureError> {
    let device = Kvm::new().map_err(kvm("open /dev/kvm"))?;
    let mut iterations = SHORTEST;
    loop {
        let took = run(&device, mode, iterations)?;
        if took >= LONG_ENOUGH || iterations >= LONGEST {
            return Ok(2.0 * f64::from(iterations) / took.as_secs_f64().max(1e-9));
        }
        iterations = (iterations * 4).min(LONGEST);
    }
}

fn run(device: &Kvm, mode: Mode, iterations: u32) -> Result<Duration, MeasureError> {
    // Declared before the VM, so that the VM is gone before its memory is.
    let memory: MmapRegion<()> = MmapRegion::new(MEMORY_BYTES)?;
    let vm = device.create_vm().map_err(kvm("create a VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the region is a private anonymous mapping of exactly MEMORY_BYTES that this function
    // owns; `vm` and its vCPU are dropped before it. Nothing in Rust holds a reference into it while
    // the guest runs: all access is volatile, through `MmapRegion`.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm("give the VM memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(kvm("create a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(kvm("read the vCPU"))?;
    let slice = memory.as_volatile_slice();
    let code = match mode {
        Mode::Real => {
            sregs.cs.base = 0;
            sregs.cs.selector = 0;
            // mov ecx, imm32; l: dec ecx; jnz l; hlt, with operand size prefixes
            program(&[0x66, 0xb9], iterations, &[0x66, 0x49, 0x75, 0xfc, 0xf4])
        }
        Mode::Long => {
            enter_long_mode(&mut sregs);
            let entries = [
                (GDT + 8, 0x00af_9b00_0000_ffff),                    // 64-bit code
                (GDT + 16, 0x00cf_9300_0000_ffff),                   // data
                (PAGE_TABLES, PAGE_TABLES as u64 + 0x1003),          // PML4
                (PAGE_TABLES + 0x1000, PAGE_TABLES as u64 + 0x2003), // page directory pointers
                (PAGE_TABLES + 0x2000, 0x83),                        // one page of 2 MiB at 0
            ];
            for (at, value) in entries {
                slice.write_obj(value, at)?;
            }
            program(&[0xb9], iterations, &[0xff, 0xc9, 0x75, 0xfc, 0xf4])
        }
    };
    slice.write_slice(&code, CODE)?;
    vcpu.set_sregs(&sregs).map_err(kvm("set up the vCPU"))?;
    let regs = kvm_regs {
        rip: CODE as u64,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("set up the vCPU"))?;
    let start = Instant::now();
    match vcpu.run().map_err(kvm("run the vCPU"))? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        other => Err(MeasureError::WrongExit(format!("{other:?}"))),
    }
}

fn program(head: &[u8], iterations: u32, tail: &[u8]) -> Vec<u8> {
    [head, &iterations.to_le_bytes(), tail].concat()
}

/// Control registers and flat segments as a kernel has them right after its start.
fn enter_long_mode(sregs: &mut kvm_sregs) {
    const CR0_PE_MP_ET_NE_WP_PG: u64 = 0x8001_0033;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 0x500;
    let segment = |selector, type_, long: bool| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long),
        db: u8::from(!long),
        ..Default::default()
    };
    sregs.cr0 = CR0_PE_MP_ET_NE_WP_PG;
    sregs.cr3 = PAGE_TABLES as u64;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    sregs.cs = segment(8, 11, true);
    let data = segment(16, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT as u64;
    sregs.gdt.limit = 23;
}
