//! The tokens file of a node: read at its start, and again when it changes or an operator asks, so that a token can be revoked
//! while the node runs.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::time::Instant;
use tracing::{info, warn};

use super::auth::{Tokens, TokensError};

/// Between two looks at the file.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Why a tokens file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It can't be read.
    #[error("{}: {why}", .path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Why not.
        why: io::Error,
    },
    /// One of its lines is wrong.
    #[error("{}: {why}", .path.display())]
    Line {
        /// Path of the file.
        path: PathBuf,
        /// Which line, and what is expected there.
        why: TokensError,
    },
}

/// What tells one content of a file from another without reading it: inode, length and time of the last change.
type FileMark = Option<(u64, u64, SystemTime)>;

/// Tokens that follow their file. Clones share them.
#[derive(Clone)]
pub struct TokenFile(Arc<TokenFileState>);

struct TokenFileState {
    path: PathBuf,
    current: ArcSwap<Tokens>,
    looked: Mutex<(Instant, FileMark)>,
}

impl TokenFile {
    /// Reads the file.
    ///
    /// # Errors
    /// When it can't be read, or a line of it is no token's.
    pub fn open(path: &Path) -> Result<Self, TokenFileError> {
        let mark = mark(path);
        let current = ArcSwap::from_pointee(read(path)?);
        Ok(Self(Arc::new(TokenFileState { path: path.into(), current, looked: Mutex::new((Instant::now(), mark)) })))
    }

    /// Returns the tokens that are accepted, read again when the file has changed; what can't be used leaves the old ones in force.
    pub fn current(&self) -> Arc<Tokens> {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> Arc<Tokens> {
        let mut looked = self.0.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(looked.0) >= LOOK_EVERY {
            let found = mark(&self.0.path);
            *looked = (now, if found == looked.1 { found } else { self.take_up() });
        }
        drop(looked);
        self.0.current.load_full()
    }

    /// Reads the file now, whether or not it has changed; what can't be used leaves the old tokens in force.
    pub fn reload(&self) {
        let mut looked = self.0.looked.lock().unwrap_or_else(PoisonError::into_inner);
        *looked = (Instant::now(), self.take_up());
    }

    /// Returns the mark of the file that was looked at.
    fn take_up(&self) -> FileMark {
        let found = mark(&self.0.path);
        match read(&self.0.path) {
            Ok(tokens) => {
                info!(file = %self.0.path.display(), tokens = tokens.len(), "tokens taken up");
                self.0.current.store(Arc::new(tokens));
            }
            Err(error) => warn!("the changed tokens file can't be used, the tokens before stay in force: {error}"),
        }
        found
    }
}

fn read(path: &Path) -> Result<Tokens, TokenFileError> {
    let text = fs::read_to_string(path).map_err(|why| TokenFileError::Read { path: path.into(), why })?;
    Tokens::parse(&text).map_err(|why| TokenFileError::Line { path: path.into(), why })
}

fn mark(path: &Path) -> FileMark {
    let found = fs::metadata(path).ok()?;
    Some((found.ino(), found.len(), found.modified().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(token: &str) -> String {
        format!("operator alice {}\n", blake3::hash(token.as_bytes()))
    }

    /// Returns true when a token is accepted, `looks` looks at the file after it was opened.
    fn knows(tokens: &TokenFile, looks: u32, token: &str) -> bool {
        tokens.at(Instant::now() + LOOK_EVERY * looks).actor_of(token).is_some()
    }

    #[test]
    fn a_token_that_left_the_file_is_refused_and_a_new_one_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        fs::write(&path, line("leaked")).unwrap();
        let tokens = TokenFile::open(&path).unwrap();
        assert!(knows(&tokens, 0, "leaked"));
        // Replaced by a rename, as careful editors and Kubernetes do it.
        fs::write(dir.path().join("next"), line("fresh!")).unwrap();
        fs::rename(dir.path().join("next"), &path).unwrap();
        assert!(!knows(&tokens, 1, "leaked") && knows(&tokens, 1, "fresh!"));
        // Written in place.
        fs::write(&path, format!("{}{}", line("fresh!"), line("third"))).unwrap();
        assert!(knows(&tokens, 2, "fresh!") && knows(&tokens, 2, "third"));
        // An empty file revokes all.
        fs::write(&path, "# nobody\n").unwrap();
        assert!(!knows(&tokens, 3, "fresh!"));
    }

    #[test]
    fn a_file_that_cannot_be_used_changes_nothing_until_it_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        fs::write(&path, line("one")).unwrap();
        let tokens = TokenFile::open(&path).unwrap();
        fs::write(&path, "operator alice no-hash\n").unwrap();
        assert!(knows(&tokens, 1, "one"));
        fs::remove_file(&path).unwrap();
        assert!(knows(&tokens, 2, "one"));
        fs::write(&path, line("two")).unwrap();
        assert!(knows(&tokens, 3, "two") && !knows(&tokens, 3, "one"));
        let missing = TokenFile::open(&dir.path().join("none")).err().unwrap();
        assert!(missing.to_string().contains("none: No such file"), "{missing}");
    }

    #[test]
    fn a_reload_does_not_wait_for_the_next_look() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        fs::write(&path, line("one")).unwrap();
        let tokens = TokenFile::open(&path).unwrap();
        fs::write(&path, line("two")).unwrap();
        assert!(knows(&tokens, 0, "one"));
        tokens.reload();
        assert!(knows(&tokens, 0, "two") && !knows(&tokens, 0, "one"));
    }
}
