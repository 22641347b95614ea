//! The crash tests proper.

use super::world::World;
use crate::volume::mutant::{self, Mutant};

/// Seeded lives; `OFFLOAD_SIM_SEEDS` runs more of them.
fn seeds(default: u64) -> u64 {
    std::env::var("OFFLOAD_SIM_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn first_violation(from: u64, count: u64, mutant: Option<Mutant>) -> Option<(u64, String)> {
    first_violation_of(World::new, from, count, mutant)
}

fn first_violation_of(
    world: fn(u64) -> World,
    from: u64,
    count: u64,
    mutant: Option<Mutant>,
) -> Option<(u64, String)> {
    mutant::set(mutant);
    let found = (from..from + count).find_map(|seed| {
        let life = std::panic::catch_unwind(|| world(seed).run());
        let outcome = life.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            Err(format!("panic: {text}"))
        });
        outcome.err().map(|violation| (seed, violation))
    });
    mutant::set(None);
    found
}

#[test]
fn no_crash_loses_an_acknowledged_write_or_leaves_a_block_that_does_not_authenticate() {
    let violation = first_violation(0, seeds(1500), None);
    assert!(
        violation.is_none(),
        "seed {}: {}",
        violation.as_ref().unwrap().0,
        violation.as_ref().unwrap().1
    );
}

#[test]
fn a_disk_that_fails_fills_up_and_dies_loses_nothing_acknowledged_and_hangs_no_request() {
    let violation = first_violation_of(World::faulty, 0, seeds(1500) / 3, None);
    assert!(
        violation.is_none(),
        "seed {}: {}",
        violation.as_ref().unwrap().0,
        violation.as_ref().unwrap().1
    );
}

macro_rules! caught {
    ($world:expr; $($name:ident: $mutant:ident,)*) => {$(
        #[test]
        fn $name() {
            let found = first_violation_of($world, 0, 4000, Some(Mutant::$mutant));
            assert!(found.is_some(), "the tests do not notice {:?}", Mutant::$mutant);
        }
    )*};
}

caught! { World::few;
    a_barrier_before_the_log_has_landed_is_noticed: SyncBeforeLog,
    a_missing_barrier_is_noticed: NoBarrier,
    freeing_slots_before_the_commit_is_noticed: EarlyFree,
    not_verifying_the_last_commit_is_noticed: SkipVerify,
    taking_a_draft_for_more_than_it_holds_is_noticed: DraftForAll,
    a_commit_before_the_data_of_its_draft_have_landed_is_noticed: HastyDraft,
    acknowledging_before_the_data_landed_is_noticed: EarlyAck,
    ignoring_the_delta_ring_is_noticed: IgnoreRing,
    a_superblock_without_a_barrier_for_its_pages_is_noticed: NoPageBarrier,
    overwriting_pages_before_the_superblock_is_durable_is_noticed: EarlyPageFree,
    going_on_with_a_dead_process_session_is_noticed: SameSession,
    a_single_superblock_copy_is_noticed: OneSuperblock,
    freeing_the_old_place_of_a_block_before_the_move_is_durable_is_noticed: MoveEarlyFree,
    moving_a_block_over_a_later_write_is_noticed: MoveBlindly,
    publishing_a_move_before_it_has_landed_is_noticed: MoveUnwritten,
    a_header_that_is_longer_than_its_backing_is_noticed: GrowBeforeBacking,
    releasing_the_delta_ring_before_the_commit_is_durable_is_noticed: EarlyRingRelease,
    using_a_slot_again_under_a_read_is_noticed: SlotUnderRead,
}

caught! { World::faulty;
    leaving_a_draft_without_data_in_the_log_is_noticed: KeepFailedDraft,
}

caught! { World::new;
    forgetting_a_changed_page_is_noticed: EvictDirty,
    forgetting_a_page_while_it_is_being_written_is_noticed: EvictUnwritten,
    forgetting_what_an_admitted_write_needs_is_noticed: TouchWithoutPin,
    taking_a_leaf_that_is_not_in_memory_for_holes_is_noticed: MissIsHole,
}
