//! The real program, as a user starts it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, mpsc};
use std::thread::JoinHandle;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tempfile::TempDir;

pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optin-proxy"));
    command.args(arguments);
    // What the developer's own environment sets is none of the test's business.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OPTIN_PROXY_") {
            command.env_remove(name);
        }
    }
    // A certificate authority of the tests' own, if they come to make one.
    static DATA: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));
    command.env("XDG_DATA_HOME", DATA.path());
    command
}

/// What is started meanwhile may use one CPU.
pub fn on_one_cpu<T>(start: impl FnOnce() -> T) -> T {
    let all = sched_getaffinity(None).expect("Linux");
    let mut one = CpuSet::new();
    one.set((0..CpuSet::MAX_CPU).find(|&cpu| all.is_set(cpu)).expect("this thread runs"));
    sched_setaffinity(None, &one).expect("it is one of them");
    let started = start();
    sched_setaffinity(None, &all).expect("as it was");
    started
}

#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// Runs to the end, with this on standard input.
pub fn run(arguments: &[&str], stdin: &[u8]) -> Output {
    run_command(command(arguments), stdin)
}

pub fn run_command(mut command: Command, stdin: &[u8]) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let mut input = child.stdin.take().expect("piped");
    let stdin = stdin.to_vec();
    let feeding = std::thread::spawn(move || input.write_all(&stdin));
    let output = child.wait_with_output().expect("it ends");
    // The program need not read all of it.
    let _ = feeding.join();
    Output {
        code: output.status.code(),
        stdout: output.stdout,
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// A running server; killed when dropped.
pub struct Running {
    child: Child,
    pub address: SocketAddr,
    stderr: Option<JoinHandle<String>>,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Running {
    /// Starts a command and waits until it says where it listens.
    pub fn start(command: &mut Command) -> Self {
        Self::start_reading(command, Stdio::null())
    }

    /// The same with a standard error whose reader has gone.
    pub fn start_unread(command: &mut Command) -> Self {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(writer);
        let child = command.spawn().expect("the program starts");
        Self::listening(child, std::thread::spawn(String::new))
    }

    /// The same with something else than nothing on standard input.
    pub fn start_reading(command: &mut Command, stdin: Stdio) -> Self {
        let (_, now) = mpsc::channel();
        Self::start_read_late(command, stdin, now)
    }

    /// The same with a standard error that nobody reads until the other end of `begin` is dropped.
    pub fn start_read_late(command: &mut Command, stdin: Stdio, begin: mpsc::Receiver<()>) -> Self {
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut stderr = child.stderr.take().expect("piped");
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = begin.recv();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Self::listening(child, stderr)
    }

    /// Waits until it says where it listens.
    fn listening(mut child: Child, stderr: JoinHandle<String>) -> Self {
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a line");
        let address = line
            .trim_end()
            .strip_prefix("listening on ")
            .unwrap_or_else(|| panic!("not an address: {line:?}"))
            .parse()
            .expect("an address");
        Self { child, address, stderr: Some(stderr), stdout }
    }

    /// What the kernel says of it.
    pub fn told_by_the_kernel(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid())).expect("Linux")
    }

    /// The names of its threads.
    pub fn threads(&self) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("Linux");
        tasks
            .map(|task| std::fs::read_to_string(task.expect("a thread").path().join("comm")))
            .map(|name| name.expect("it has one").trim_end().to_owned())
            .collect()
    }

    pub fn refuses_huge_pages(&self) -> bool {
        self.told_by_the_kernel("status").lines().any(|line| line == "THP_enabled:\t0")
    }

    pub fn read_line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a line");
        line
    }

    /// The next line: where operators reach it.
    pub fn admin(&mut self) -> SocketAddr {
        let line = self.read_line();
        let address = line
            .trim_end()
            .strip_suffix(" (admin)")
            .and_then(|it| it.strip_prefix("listening on "));
        address.unwrap_or_else(|| panic!("not an address: {line:?}")).parse().expect("an address")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .expect("kill is there");
        assert!(status.success());
    }

    /// Waits for the end, whatever it still has to say.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("it ends")
    }

    /// Waits for the end; status and standard error.
    pub fn finish(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().expect("it ends");
        let stderr = self.stderr.take().expect("taken once").join().expect("it was read");
        (status, stderr)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
