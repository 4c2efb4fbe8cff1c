//! An operator with an authenticator app, as a script would play one.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use countersign_testkit::authenticator::App;
use serde_json::Value;

use super::{Mesh, binary, said};

/// Seconds since 1970.
pub fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Enrols with `operator enroll` or `factor add`, as a script would.
pub fn enrol(mesh: &Mesh, arguments: &[&str]) -> (App, Value) {
    enrol_with(binary().arg("-C").arg(&mesh.dir), arguments)
}

/// As [`enrol`], of the mesh that `command` names.
pub fn enrol_with(command: &mut Command, arguments: &[&str]) -> (App, Value) {
    let mut child = command
        .args(["-o", "json"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let Some(first) = lines.next() else { panic!("{}", said(&child.wait_with_output().unwrap())) };
    let first: Value = serde_json::from_str(&first.unwrap()).unwrap();
    let app = App::read(first["operator"].as_str().unwrap(), first["otpauth"].as_str().unwrap());
    writeln!(child.stdin.take().unwrap(), "{}", app.code(now_seconds())).unwrap();
    let last = lines.next().map(|line| serde_json::from_str(&line.unwrap()).unwrap());
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", said(&ended));
    (app, last.expect("a second line"))
}

/// A code that was not used yet, as soon as there is one that is taken now: of this step or of the next.
pub fn next_code(app: &App, used: &mut u64) -> String {
    loop {
        let now = now_seconds() / 30;
        let step = now.max(*used + 1);
        if step <= now + 1 {
            *used = step;
            return app.code(step * 30);
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// The document that a command printed.
pub fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(output)))
}
