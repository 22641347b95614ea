use std::net::IpAddr;

use super::*;
use crate::policy::flowlog::Record;

fn who() -> Identity {
    Identity {
        account: "000000000000".into(),
        interface: "eni-0".into(),
    }
}

fn window(start: u64, ports: &[u16]) -> Window {
    let record = |port: &u16| Record {
        source: (IpAddr::from([10, 0, 2, 15]), *port),
        destination: (IpAddr::from([192, 0, 2, 1]), 443),
        protocol: 6,
        packets: 3,
        bytes: 300,
        start,
        end: start + 1,
        is_accepted: true,
    };
    Window {
        start,
        end: start + 60,
        records: ports.iter().map(record).collect(),
        skipped: 0,
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn windows_become_lines_and_the_end_waits_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    let file = FlowFile::open(&path, 1 << 20, 2, who()).unwrap();
    let mut feed = file.feed();
    let stats = Arc::clone(file.stats());
    let writer = file.spawn().unwrap();
    feed.put(window(60, &[1, 2]));
    feed.put(window(120, &[]));
    drop(writer);
    let text = read(&path);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "2 000000000000 eni-0 10.0.2.15 192.0.2.1 1 443 6 3 300 60 61 ACCEPT OK",
            "2 000000000000 eni-0 10.0.2.15 192.0.2.1 2 443 6 3 300 60 61 ACCEPT OK",
            "2 000000000000 eni-0 - - - - - - - 120 180 - NODATA",
        ]
    );
    assert_eq!((stats.lines.get(), stats.lost.get()), (3, 0));
}

#[test]
fn windows_of_two_queues_for_one_interval_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    let file = FlowFile::open(&path, 1 << 20, 0, who()).unwrap();
    let (mut one, mut two) = (file.feed(), file.feed());
    let writer = file.spawn().unwrap();
    one.put(window(60, &[]));
    two.put(window(60, &[7]));
    drop(writer);
    let text = read(&path);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(!text.contains("NODATA"), "{text}");
}

#[test]
fn a_writer_that_is_stuck_holds_nobody_up_and_the_next_line_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    let file = FlowFile::open(&path, 1 << 20, 0, who()).unwrap();
    let mut feed = file.feed();
    let stats = Arc::clone(file.stats());
    // Nobody writes yet: after as many windows as wait, they are dropped.
    for interval in 0..WAITING as u64 + 3 {
        feed.put(window(60 * interval, &[1]));
    }
    assert_eq!(stats.lost.get(), 3);
    let writer = file.spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    let late = 60 * 100;
    while feed.skipped > 0 {
        assert!(Instant::now() < end);
        feed.put(window(late, &[1]));
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(writer);
    let text = read(&path);
    let told = format!("2 000000000000 eni-0 - - - - - - - {late} 6060 - SKIPDATA");
    assert_eq!(text.lines().last(), Some(told.as_str()), "{text}");
    assert_eq!(text.matches("SKIPDATA").count(), 1, "{text}");
}

#[test]
fn files_keep_to_their_size_and_the_oldest_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    let name = |number: u32| dir.path().join(format!("flows.{number}"));
    let mut files = Rotated::open(&path, 100, 2).unwrap();
    for letter in b'a'..=b'i' {
        files.append(&[letter; 40]).unwrap();
    }
    let of = |letters: &str| letters.chars().map(|c| c.to_string().repeat(40)).collect();
    let want: [String; 3] = [of("i"), of("gh"), of("ef")];
    assert_eq!([read(&path), read(&name(1)), read(&name(2))], want);
    // What comes after a restart goes on where the file ends.
    drop(files);
    let mut files = Rotated::open(&path, 100, 2).unwrap();
    files.append(&[b'j'; 40]).unwrap();
    assert_eq!(read(&path), of("ij") as String);
    // Longer than a file may be: alone in one, whole.
    files.append(&[b'k'; 200_000]).unwrap();
    files.append(b"l").unwrap();
    assert_eq!(read(&path), "l");
    assert_eq!(read(&name(1)).len(), 200_000);
    assert_eq!(read(&name(2)), of("ij") as String);
}

#[test]
fn a_full_disk_loses_the_window_whole_and_says_so() {
    let mut file = FlowFile::open(Path::new("/dev/full"), 1 << 20, 0, who()).unwrap();
    let mut complaints = RateLimited::new(1, Duration::from_secs(60));
    assert!(!file.write(Some(window(60, &[1])), &mut complaints));
    assert_eq!((file.stats.lines.get(), file.stats.lost.get()), (0, 1));
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let error = FlowFile::open(Path::new("/nowhere/flows"), 1, 0, who()).unwrap_err();
    assert!(error.to_string().contains("/nowhere/flows"), "{error}");
}
