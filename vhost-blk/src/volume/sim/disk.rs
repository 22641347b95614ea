//! A disk that may lose or tear what no barrier covers.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard};

use super::world::Dice;
use crate::volume::backing::Backing;
use crate::volume::geometry::BLOCK_LEN;

type Sheet = Box<[u8; BLOCK_LEN]>;

struct Pending {
    id: u64,
    slot: u64,
    data: Sheet,
    is_done: bool,
}

#[derive(Default)]
struct State {
    len: u64,
    durable_len: u64,
    durable: HashMap<u64, Sheet>,
    /// In the order they were submitted.
    pending: Vec<Pending>,
    next_id: u64,
    /// Blocking operations until the process dies in the middle of one.
    fuse: Option<u32>,
    /// It has died: what it still tries comes to nothing.
    has_died: bool,
}

/// See the module.
pub(super) struct SimDisk {
    state: Mutex<State>,
}

fn blank() -> Sheet {
    Box::new([0; BLOCK_LEN])
}

impl State {
    /// These writes end, each as old, new or torn.
    fn cut_short(&mut self, is_cut: impl Fn(&Pending) -> bool, dice: &mut Dice) {
        let (cut, others): (Vec<Pending>, Vec<Pending>) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(is_cut);
        self.pending = others;
        for mut write in cut {
            match dice.below(3) {
                0 => continue,
                1 => write.data = tear(&[self.view(write.slot), write.data], dice),
                _ => {}
            }
            write.is_done = true;
            self.pending.push(write);
        }
    }

    fn view(&self, slot: u64) -> Sheet {
        let landed = self
            .pending
            .iter()
            .rev()
            .find(|write| write.slot == slot && write.is_done);
        landed
            .map(|write| write.data.clone())
            .or_else(|| self.durable.get(&slot).cloned())
            .unwrap_or_else(blank)
    }

    fn settle(&mut self, covered: &[u64]) {
        let State {
            durable, pending, ..
        } = self;
        pending.retain_mut(|write| {
            if !covered.contains(&write.id) {
                return true;
            }
            durable.insert(write.slot, std::mem::replace(&mut write.data, blank()));
            false
        });
    }
}

/// Each 512-byte sector from one of the candidates.
fn tear(candidates: &[Sheet], dice: &mut Dice) -> Sheet {
    let mut torn = blank();
    for sector in 0..BLOCK_LEN / 512 {
        let from = &candidates[dice.below(candidates.len())];
        let range = sector * 512..(sector + 1) * 512;
        torn[range.clone()].copy_from_slice(&from[range]);
    }
    torn
}

impl SimDisk {
    pub(super) fn new(len: u64) -> Self {
        let state = State {
            len,
            durable_len: len,
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under it")
    }

    /// A write is under way from now on. Returns its parts.
    pub(super) fn submit(&self, offset: u64, bytes: &[u8]) -> Vec<u64> {
        let mut state = self.state();
        let first = offset / BLOCK_LEN as u64;
        bytes
            .chunks_exact(BLOCK_LEN)
            .zip(first..)
            .map(|(part, slot)| {
                let id = state.next_id;
                state.next_id += 1;
                let data = part
                    .to_vec()
                    .into_boxed_slice()
                    .try_into()
                    .expect("a block");
                state.pending.push(Pending {
                    id,
                    slot,
                    data,
                    is_done: false,
                });
                id
            })
            .collect()
    }

    pub(super) fn complete(&self, ids: &[u64]) {
        for write in &mut self.state().pending {
            write.is_done |= ids.contains(&write.id);
        }
    }

    /// Writes that failed: each leaves the old, the new or a torn block.
    pub(super) fn abandon(&self, ids: &[u64], dice: &mut Dice) {
        self.state()
            .cut_short(|write| ids.contains(&write.id), dice);
    }

    /// What a barrier that is submitted now will cover.
    pub(super) fn begin_sync(&self) -> Vec<u64> {
        self.state()
            .pending
            .iter()
            .filter(|write| write.is_done)
            .map(|write| write.id)
            .collect()
    }

    pub(super) fn end_sync(&self, covered: &[u64]) {
        let mut state = self.state();
        state.settle(covered);
        state.durable_len = state.len;
    }

    pub(super) fn set_fuse(&self, fuse: Option<u32>) {
        let mut state = self.state();
        state.fuse = fuse;
        state.has_died = false;
    }

    pub(super) fn has_died(&self) -> bool {
        self.state().has_died
    }

    /// The process dies: what had completed stays visible, what was under way ends as old, new
    /// or torn.
    pub(super) fn kill(&self, dice: &mut Dice) {
        let mut state = self.state();
        state.fuse = None;
        state.cut_short(|write| !write.is_done, dice);
    }

    /// The power goes: each block keeps its old value, any value written since, or a mixture.
    pub(super) fn cut_power(&self, dice: &mut Dice) {
        let mut state = self.state();
        state.fuse = None;
        if dice.chance(50) {
            state.len = state.durable_len;
        }
        state.durable_len = state.len;
        let mut written: HashMap<u64, Vec<Sheet>> = HashMap::new();
        let mut order = Vec::new();
        for write in std::mem::take(&mut state.pending) {
            let values = written.entry(write.slot).or_default();
            if values.is_empty() {
                order.push(write.slot);
            }
            values.push(write.data);
        }
        for slot in order {
            let mut values = written.remove(&slot).expect("it was put there");
            let value = match dice.below(20) {
                0..8 => continue,
                8..17 => values.swap_remove(dice.below(values.len())),
                _ => {
                    values.push(state.durable.get(&slot).cloned().unwrap_or_else(blank));
                    tear(&values, dice)
                }
            };
            state.durable.insert(slot, value);
        }
    }

    /// Flips a bit of what is stored.
    pub(super) fn flip(&self, offset: u64, bit: u8) {
        let mut state = self.state();
        assert!(state.pending.is_empty(), "flip only what is at rest");
        let sheet = state
            .durable
            .entry(offset / BLOCK_LEN as u64)
            .or_insert_with(blank);
        sheet[(offset % BLOCK_LEN as u64) as usize] ^= 1 << bit;
    }

    /// Everything at rest, to be put back later.
    pub(super) fn image(&self) -> HashMap<u64, Sheet> {
        self.state().durable.clone()
    }

    /// Replaces what is at rest.
    pub(super) fn restore(&self, image: HashMap<u64, Sheet>) {
        let mut state = self.state();
        state.pending.clear();
        state.durable = image;
    }

    fn burn(state: &mut State) -> io::Result<()> {
        match &mut state.fuse {
            Some(0) => {
                state.has_died = true;
                Err(io::Error::other("the process died"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Backing for SimDisk {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        Self::burn(&mut state)?;
        if offset + into.len() as u64 > state.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let first = offset / BLOCK_LEN as u64;
        for (part, slot) in into.chunks_exact_mut(BLOCK_LEN).zip(first..) {
            part.copy_from_slice(&state.view(slot)[..]);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        if self.has_died() {
            return Err(io::Error::other("the process died before"));
        }
        let burnt = Self::burn(&mut self.state());
        let ids = self.submit(offset, from);
        burnt?;
        self.complete(&ids);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Self::burn(&mut self.state())?;
        let covered = self.begin_sync();
        self.end_sync(&covered);
        Ok(())
    }

    fn allocate(&self, _: u64, _: u64) -> io::Result<()> {
        Self::burn(&mut self.state())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = vec![0; len as usize];
        self.write_at(offset, &zeros)
    }

    fn extend(&self, len: u64) -> io::Result<u64> {
        let mut state = self.state();
        Self::burn(&mut state)?;
        state.len = state.len.max(len);
        Ok(state.len)
    }

    fn len(&self) -> u64 {
        self.state().len
    }
}
