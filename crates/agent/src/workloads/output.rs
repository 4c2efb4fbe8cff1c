//! What a process writes, line by line: forwarded to whoever listens, the last lines kept for the day it dies. Bounded:
//! a long line is cut, a slow listener misses some, and a process is never kept waiting for its reader.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of one line that are kept.
const LINE_BYTES_MAX: usize = 4096;
/// Lines that are kept for the day it dies.
const LAST_LINES: usize = 10;

type Listener = dyn Fn(String) + Send + Sync;

/// The lines of one process.
#[derive(Clone)]
pub(super) struct Output {
    last: Arc<Mutex<VecDeque<String>>>,
    listener: Arc<Listener>,
}

impl Output {
    /// Every line goes to `listener`.
    pub(super) fn new(listener: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self { last: Arc::default(), listener: Arc::new(listener) }
    }

    /// Reads `from` to its end, in a task of its own.
    pub(super) fn read(&self, from: impl AsyncRead + Send + Unpin + 'static) {
        tokio::spawn(self.clone().read_all(from));
    }

    /// Forgets the last lines: what comes now is of another life.
    pub(super) fn forget(&self) {
        self.last.lock().clear();
    }

    /// The last lines so far.
    pub(super) fn last_lines(&self) -> Vec<String> {
        self.last.lock().iter().cloned().collect()
    }

    async fn read_all(self, mut from: impl AsyncRead + Unpin) {
        let mut line = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(1..) = from.read(&mut chunk).await.inspect(|n| {
            for byte in &chunk[..*n] {
                match byte {
                    b'\n' => self.line(&mut line),
                    byte if line.len() < LINE_BYTES_MAX => line.push(*byte),
                    _ => {}
                }
            }
        }) {}
        if !line.is_empty() {
            self.line(&mut line);
        }
    }

    fn line(&self, bytes: &mut Vec<u8>) {
        let text = String::from_utf8_lossy(bytes).trim_end_matches('\r').to_owned();
        bytes.clear();
        {
            let mut last = self.last.lock();
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(text.clone());
        }
        (self.listener)(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(given: &'static [u8]) -> (Vec<String>, Vec<String>) {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let listener = heard.clone();
        let output = Output::new(move |line| listener.lock().push(line));
        output.clone().read_all(given).await;
        (heard.lock().clone(), output.last_lines())
    }

    #[tokio::test]
    async fn lines_are_cut_where_they_end_and_where_they_are_too_long() {
        let long: &'static str = "x".repeat(LINE_BYTES_MAX + 100).leak();
        for (given, expected) in [
            ("", vec![]),
            ("one\ntwo\r\nthree", vec!["one", "two", "three"]),
            ("\n", vec![""]),
            (long, vec![&long[..LINE_BYTES_MAX]]),
        ] {
            assert_eq!(lines(given.as_bytes()).await.0, expected);
        }
        assert_eq!(lines(b"a\xffb\n").await.0, ["a\u{fffd}b"]);
    }

    #[tokio::test]
    async fn only_the_last_lines_are_kept() {
        let many: String = (0..100).map(|n| format!("{n}\n")).collect();
        let (heard, last) = lines(many.leak().as_bytes()).await;
        assert_eq!(heard.len(), 100);
        assert_eq!(last, (90..100).map(|n| n.to_string()).collect::<Vec<_>>());
    }
}
