use super::*;
use crate::local::FlowKey;

fn meta(protocol: u8, port: u16) -> Meta {
    Meta {
        key: FlowKey {
            protocol,
            guest: format!("10.0.2.15:{port}").parse().unwrap(),
            peer: "93.184.216.34:443".parse().unwrap(),
        },
        bytes: 1500,
        packets: 2,
        tcp_flags: 16,
        icmp: (0, 0),
    }
}

fn who() -> Identity {
    Identity {
        account: "123456789012".into(),
        interface: "eni-7".into(),
    }
}

const UNIX: Duration = Duration::from_secs(1_700_000_045);

fn second(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_window_has_one_line_a_direction_and_decision_with_the_fields_in_order() {
    let now = Instant::now();
    let mut log = FlowLog::new(60, 100, now, UNIX);
    log.record(Direction::Out, &meta(6, 40000), Decision::Allow, now);
    log.record(
        Direction::Out,
        &meta(6, 40000),
        Decision::Allow,
        now + second(3),
    );
    log.record(
        Direction::In,
        &meta(6, 40000),
        Decision::Allow,
        now + second(4),
    );
    log.record(
        Direction::In,
        &meta(17, 22),
        Decision::Deny,
        now + second(5),
    );
    log.record(
        Direction::Out,
        &meta(1, 77),
        Decision::Allow,
        now + second(5),
    );
    // 1700000045 is 5 seconds into its minute, so the window ends in 55.
    assert_eq!(log.take(now + second(54)), None);
    let window = log.take(now + second(55)).unwrap();
    let text = window.lines(&who());
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "2 123456789012 eni-7 10.0.2.15 93.184.216.34 0 0 1 2 1500 1700000050 1700000050 ACCEPT OK",
            "2 123456789012 eni-7 10.0.2.15 93.184.216.34 40000 443 6 4 3000 1700000045 1700000048 ACCEPT OK",
            "2 123456789012 eni-7 93.184.216.34 10.0.2.15 443 22 17 2 1500 1700000050 1700000050 REJECT OK",
            "2 123456789012 eni-7 93.184.216.34 10.0.2.15 443 40000 6 2 1500 1700000049 1700000049 ACCEPT OK",
        ]
    );
    assert!(lines.iter().all(|line| line.split(' ').count() == 14));
}

#[test]
fn a_quiet_window_says_nodata_and_a_crowded_one_skipdata() {
    let now = Instant::now();
    let mut log = FlowLog::new(60, 3, now, UNIX);
    let window = log.take(now + second(55)).unwrap();
    assert_eq!(
        window.lines(&who()),
        "2 123456789012 eni-7 - - - - - - - 1700000040 1700000100 - NODATA\n"
    );
    for port in 0..10 {
        log.record(
            Direction::Out,
            &meta(6, port),
            Decision::Allow,
            now + second(60),
        );
    }
    let window = log.take(now + second(115)).unwrap();
    assert_eq!((window.records.len(), window.skipped), (3, 14));
    let text = window.lines(&who());
    assert_eq!(
        text.lines()
            .filter(|line| line.ends_with("ACCEPT OK"))
            .count(),
        3
    );
    assert!(
        text.ends_with("2 123456789012 eni-7 - - - - - - - 1700000100 1700000160 - SKIPDATA\n")
    );
}

#[test]
fn windows_follow_each_other_and_a_long_sleep_skips_the_missed_ones() {
    let now = Instant::now();
    let mut log = FlowLog::new(60, 3, now, UNIX);
    assert_eq!(log.take(now + second(55)).unwrap().start, 1_700_000_040);
    assert_eq!(log.due(), now + second(115));
    assert_eq!(log.take(now + second(1000)).unwrap().start, 1_700_000_100);
    assert_eq!(log.take(now + second(1000)), None);
    assert_eq!(log.due(), now + second(1015));
}

#[test]
fn the_windows_of_two_queues_join_into_one() {
    let now = Instant::now();
    let mut one = FlowLog::new(60, 3, now, UNIX);
    let mut two = FlowLog::new(60, 3, now + second(1), UNIX + second(1));
    two.record(
        Direction::Out,
        &meta(6, 1),
        Decision::Allow,
        now + second(2),
    );
    let mut window = one.take(now + second(56)).unwrap();
    window.join(two.take(now + second(57)).unwrap());
    assert_eq!((window.start, window.records.len()), (1_700_000_040, 1));
    assert!(!window.lines(&who()).contains("NODATA"));
}
