//! The properties that the fuzz targets drive, over a few thousand inputs by a fixed seed.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use fastrand::Rng;

use crate::contact::{C, U, reference};

#[path = "../fuzz/properties.rs"]
mod properties;

/// Files of a folder, in order.
fn files(folder: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths: Vec<_> =
        folder.read_dir().expect("it is there").map(|it| it.expect("a file").path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a file")).collect()
}

/// An input that was one of these.
fn mutated(rng: &mut Rng, seeds: &[Vec<u8>], tokens: &[&str]) -> Vec<u8> {
    let mut input = rng.choice(seeds).expect("there are seeds").clone();
    for _ in 0..rng.usize(0..6) {
        let from = rng.usize(0..=input.len());
        let to = (from + rng.usize(0..12)).min(input.len());
        let inserted = match rng.usize(0..6) {
            0 => vec![rng.u8(..)],
            1 => Vec::new(),
            2 => input[from..].to_vec(),
            3 => {
                let other = rng.choice(seeds).expect("there are seeds");
                other[rng.usize(0..=other.len())..].to_vec()
            }
            _ => rng.choice(tokens).expect("there are tokens").as_bytes().to_vec(),
        };
        input.splice(from..to, inserted);
        input.truncate(8192);
    }
    input
}

fn run(target: fn(&[u8]), folder: &str, cases: usize, tokens: &[&str]) {
    let seeds = files(folder);
    for seed in &seeds {
        target(seed);
    }
    let mut rng = Rng::with_seed(7);
    for _ in 0..cases {
        let input = mutated(&mut rng, &seeds, tokens);
        let outcome = std::panic::catch_unwind(|| target(&input));
        assert!(outcome.is_ok(), "by {}", input.escape_ascii());
    }
}

#[test]
fn documents() {
    let tokens = [
        "<",
        ">",
        "&",
        "&amp;",
        "]]>",
        "<![CDATA[",
        "<!--",
        "-->",
        "<?x",
        "?>",
        "\"",
        "'",
        "/>",
        "\u{FEFF}",
        "\0",
        "<!DOCTYPE x>",
        "</Contact>",
        "<Contact>",
        "<OptInSource>",
        "</OptInSource>",
        C,
        U,
        " xmlns=''",
        "xmlns:a='b'",
    ];
    run(properties::document, "fuzz/corpus/document", 5_000, &tokens);
}

#[test]
fn refusals() {
    let tokens = [
        " ",
        "\u{a0}",
        "owner",
        "contact",
        "\u{17f}",
        "K",
        "action by ",
        "\n",
        "(?<actor>",
        "\\w",
        "*",
        "{9}",
    ];
    run(properties::refusal, "fuzz/corpus/refusal", 2_000, &tokens);
}

#[test]
fn authorities() {
    let tokens = [".", ":", "[", "]", "*", "0x", "@", "%", "xn--", "::", "1", "\u{df}", " "];
    run(properties::authority, "fuzz/corpus/authority", 20_000, &tokens);
}

#[test]
fn configurations() {
    let tokens = [
        "\n",
        "=",
        "[",
        "]",
        "\"",
        "'",
        "[log]\n",
        "0",
        "-1",
        "\"1ns\"",
        "\"9999999999GiB\"",
        "true",
        "#",
        ".",
        "1e400",
        "nan",
    ];
    run(properties::configuration, "fuzz/corpus/configuration", 2_000, &tokens);
}

#[test]
fn exchanges() {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name() == Some(properties::PROXY_THREAD) {
            PANICKED.store(true, Ordering::SeqCst);
        }
        before(panic);
    }));
    let tokens = [
        "\r\n",
        "\n",
        "\r",
        "\0",
        " ",
        ":",
        "Content-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Host: q\r\n",
        "Connection: close\r\n",
        "0\r\n\r\n",
        "HTTP/1.0",
        "chunked, ",
        "GET http://127.0.0.1/ HTTP/1.1\r\n",
        "\u{ff}",
        "Content-Encoding: gzip\r\n",
        "ffffffffffffffff\r\n",
        "Upgrade: h2c\r\n",
        "TE: trailers\r\n",
    ];
    run(properties::exchange, "fuzz/corpus/exchange", 60, &tokens);
    assert!(!PANICKED.load(Ordering::SeqCst));
}
