//! What happened: a hash of all of it, and the last lines in words when somebody looks.

use std::collections::VecDeque;

/// Lines kept for a failure's report.
const LINES_MAX: usize = 60;

/// The record of a run.
pub struct Trace {
    hash: u64,
    words: bool,
    print: bool,
    lines: VecDeque<String>,
}

impl Trace {
    /// Returns an empty trace; `words`: keep lines, `print`: show them at once.
    pub fn new(words: bool, print: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, words: words || print, print, lines: VecDeque::new() }
    }

    /// Folds a number into the hash.
    pub fn fold(&mut self, number: u64) {
        self.hash = (self.hash ^ number).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    }

    /// Folds bytes into the hash.
    pub fn fold_bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.fold(u64::from_le_bytes(word));
        }
    }

    /// Returns the hash of everything so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Keeps a line; `words` is only called when somebody looks.
    pub fn line(&mut self, at_us: u64, node: &str, kind: &str, words: impl FnOnce() -> String) {
        if !self.words {
            return;
        }
        let mut text = words();
        if text.len() > 400 {
            let cut = (0..=400).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            text.truncate(cut);
            text.push('…');
        }
        let line = format!("{:>12.3} ms  {node:<3} {kind:<10} {text}", at_us as f64 / 1000.0);
        if self.print {
            println!("{line}");
        }
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// Returns the lines that are kept: the last ones of the run.
    pub fn lines(&self) -> impl Iterator<Item = &String> {
        self.lines.iter()
    }
}
