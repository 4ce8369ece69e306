//! The audit trail's files: when another is begun, what the chain makes of that, and which ones go.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::audit::{lines, origin, send, start, stop, verify};

fn rotated(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = folder
        .read_dir()
        .expect("it is there")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.to_str().is_some_and(|path| path.contains("/audit.jsonl.")))
        .collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_chain_goes_on_over_restarts_and_rotations_and_the_oldest_files_go() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    // Two lines fit, and a third does not.
    let settings = ["audit.max_size=2300B", "audit.keep=3"];
    for _ in 0..2 {
        let (running, _) = start(&origin, &path, &settings);
        send(&running, 3).await;
        stop(running);
    }
    let files = rotated(folder.path());
    assert_eq!(files.len(), 2, "six lines, two to a file: {files:?}");
    for file in files.iter().chain([&path]) {
        // Written at once or one by one.
        assert!(std::fs::metadata(file).expect("a file").len() <= 2300);
        assert_eq!(lines(file).len(), 2);
    }
    // In any order.
    let verified = verify(&[&path, &files[1], &files[0]]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    assert!(verified.stderr.contains("whole from line 1 to line 6"), "{}", verified.stderr);

    let (running, _) = start(&origin, &path, &settings);
    send(&running, 6).await;
    stop(running);
    let files = rotated(folder.path());
    assert_eq!(files.len(), 3);
    let all: Vec<&Path> = files.iter().map(PathBuf::as_path).chain([path.as_path()]).collect();
    let verified = verify(&all);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    assert!(verified.stderr.contains("whole from line 5 to line 12"), "{}", verified.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_too_old_is_rotated() {
    let origin = origin().await;
    for (hours, settings, count) in [(2, &[][..], 0), (25, &[], 1), (2, &["audit.max_age=1h"], 1)] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("audit.jsonl");
        let (running, _) = start(&origin, &path, settings);
        send(&running, 1).await;
        stop(running);
        let text = std::fs::read_to_string(&path).expect("it is there");
        let time =
            humantime::format_rfc3339_millis(SystemTime::now() - Duration::from_secs(hours * 3600));
        let (_, rest) = text.split_once("Z\"").expect("the time comes first");
        std::fs::write(&path, format!("{{\"time\":\"{time}\"{rest}")).expect("ours");
        let (running, _) = start(&origin, &path, settings);
        send(&running, 1).await;
        stop(running);
        assert_eq!(rotated(folder.path()).len(), count, "{hours} h, {settings:?}");
        assert_eq!(lines(&path).last().expect("a line")["seq"], 2);
    }
}

/// Regression: a rotation that was followed by no line began the chain anew, as if lines had been taken out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_goes_on_behind_a_rotation_that_nothing_followed() {
    let origin = origin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("audit.jsonl");
    let (running, _) = start(&origin, &path, &[]);
    send(&running, 2).await;
    stop(running);
    let away = folder.path().join("audit.jsonl.20260101T000000000Z-00000002");
    std::fs::rename(&path, &away).expect("ours");
    std::fs::write(&path, "").expect("ours");
    let (running, _) = start(&origin, &path, &[]);
    send(&running, 1).await;
    stop(running);
    assert_eq!(lines(&path)[0]["seq"], 3);
    let verified = verify(&[&path, &away]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
}
