//! Where a message's body ends, and what of it is passed on. Pure.
//!
//! A chunk's head is never passed on as it came: its extensions and blanks are dropped, so that no recipient can read another
//! size than this reader did (RFC 9112, 7.1.1). The bytes that stay are moved together in place.

use std::io::Write;

/// Bytes of a chunk's extension, and of all trailers, at most.
const EXTRAS_MAX: u16 = 8 * 1024;

/// A message that is answered with an error and the end of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadMessage {
    /// HTTP status that the proxy answers with.
    pub status: u16,
    /// Reason: what was expected instead.
    pub why: &'static str,
}

/// Returns the refusal of a message.
pub const fn refuse<T>(status: u16, why: &'static str) -> Result<T, BadMessage> {
    Err(BadMessage { status, why })
}

/// How much of a body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFraming {
    /// So many bytes; none: the body has ended.
    Length(u64),
    /// Chunks, with the position in them.
    Chunked(Chunk),
    /// Everything until the connection ends.
    Open,
}

/// Where in a chunked body the next byte is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// In a chunk's size, of so many digits.
    Size(u64, u8),
    /// In the blanks behind the size, so many bytes in.
    Blank(u64, u16),
    /// In the extensions behind the size, so many bytes in.
    Extension(u64, u16),
    /// At the line feed behind size and extension.
    SizeEnd(u64),
    /// In a chunk's data, with so many bytes left.
    Data(u64),
    /// At the carriage return behind the data.
    DataEnd,
    /// At the line feed behind that.
    DataEnd2,
    /// At the beginning of a trailer line, so many bytes of trailers in.
    Line(u16),
    /// Within the name of a trailer, so many bytes of trailers in.
    Name(u16),
    /// Within the value of a trailer, so many bytes of trailers in.
    Value(u16),
    /// At the line feed of a trailer line, so many bytes of trailers in.
    TrailerEnd(u16),
    /// At the last line feed.
    End,
}

/// The part of a body's bytes that is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// The data with its framing: the next recipient gets the body framed as it came.
    Framed,
    /// The data alone.
    Data,
}

/// What became of some bytes: `used` belonged to the body, and the first `kept` of them are to be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyPart {
    /// Bytes that belonged to the body, with its framing.
    pub used: usize,
    /// Bytes to pass on, at the beginning of the slice.
    pub kept: usize,
}

impl BodyFraming {
    /// A message without a body.
    pub const NONE: Self = Self::Length(0);
    /// The beginning of a chunked one.
    pub const CHUNKED: Self = Self::Chunked(Chunk::Size(0, 0));

    /// Returns true when nothing more belongs to it.
    pub fn has_ended(&self) -> bool {
        *self == Self::NONE
    }

    /// Takes the next bytes, moves what is passed on to their beginning, and moves on by what belonged to the body.
    pub fn take(&mut self, bytes: &mut [u8], keep: Keep) -> Result<BodyPart, BadMessage> {
        match self {
            Self::Open => Ok(BodyPart { used: bytes.len(), kept: bytes.len() }),
            Self::Length(left) => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= taken as u64;
                Ok(BodyPart { used: taken, kept: taken })
            }
            Self::Chunked(_) => self.take_chunks(bytes, keep, None),
        }
    }

    /// Takes the next bytes as `take` does, and keeps the data alone; the lines behind a chunked body go to `trailers`.
    pub fn take_data(&mut self, bytes: &mut [u8], trailers: &mut Vec<u8>) -> Result<BodyPart, BadMessage> {
        match self {
            Self::Chunked(_) => self.take_chunks(bytes, Keep::Data, Some(trailers)),
            _ => self.take(bytes, Keep::Data),
        }
    }

    fn take_chunks(
        &mut self,
        bytes: &mut [u8],
        keep: Keep,
        mut trailers: Option<&mut Vec<u8>>,
    ) -> Result<BodyPart, BadMessage> {
        let (mut at, mut kept) = (0, 0);
        while at < bytes.len() {
            let Self::Chunked(state) = self else { break };
            if let Chunk::Data(left) = state {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len() - at);
                if kept < at {
                    bytes.copy_within(at..at + taken, kept);
                }
                (at, kept) = (at + taken, kept + taken);
                *left -= taken as u64;
                if *left == 0 {
                    *state = Chunk::DataEnd;
                }
                continue;
            }
            let byte = bytes[at];
            let next = state.step(byte)?;
            if let Some(trailers) = trailers.as_deref_mut()
                && state.is_behind_data()
            {
                trailers.push(byte);
            }
            let dropped = matches!(next, Some(Chunk::Blank(..) | Chunk::Extension(..)));
            if keep == Keep::Framed && !dropped {
                bytes[kept] = byte;
                kept += 1;
            }
            match next {
                Some(next) => *state = next,
                None => *self = Self::NONE,
            }
            at += 1;
        }
        Ok(BodyPart { used: at, kept })
    }
}

impl Chunk {
    /// Returns true behind the last chunk, where trailers are.
    fn is_behind_data(self) -> bool {
        matches!(self, Self::Line(_) | Self::Name(_) | Self::Value(_) | Self::TrailerEnd(_) | Self::End)
    }

    /// Returns the state after one byte that is not data; none at the body's end.
    fn step(self, byte: u8) -> Result<Option<Self>, BadMessage> {
        const BAD: BadMessage = BadMessage { status: 400, why: "a chunk is not as RFC 9112 has it" };
        Ok(Some(match (self, byte) {
            (Self::Size(size, digits), _) if byte.is_ascii_hexdigit() && digits < 15 => {
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                Self::Size(size << 4 | u64::from(digit), digits + 1)
            }
            (Self::Size(size, 1..), b' ' | b'\t') => Self::Blank(size, 1),
            (Self::Blank(size, length), b' ' | b'\t') if length < EXTRAS_MAX => Self::Blank(size, length + 1),
            (Self::Size(size, 1..) | Self::Blank(size, _), b';') => Self::Extension(size, 1),
            (Self::Size(size, 1..) | Self::Blank(size, _) | Self::Extension(size, _), b'\r') => Self::SizeEnd(size),
            (Self::Extension(size, length), _) if length < EXTRAS_MAX && is_text(byte) => {
                Self::Extension(size, length + 1)
            }
            (Self::SizeEnd(0), b'\n') => Self::Line(0),
            (Self::SizeEnd(size), b'\n') => Self::Data(size),
            (Self::DataEnd, b'\r') => Self::DataEnd2,
            (Self::DataEnd2, b'\n') => Self::Size(0, 0),
            (Self::Line(_), b'\r') => Self::End,
            (Self::Line(length) | Self::Name(length), _) if length < EXTRAS_MAX && is_token(byte) => {
                Self::Name(length + 1)
            }
            (Self::Name(length), b':') => Self::Value(length),
            (Self::Value(length), _) if length < EXTRAS_MAX && is_text(byte) => Self::Value(length + 1),
            (Self::Value(length), b'\r') => Self::TrailerEnd(length),
            (Self::TrailerEnd(length), b'\n') => Self::Line(length),
            (Self::End, b'\n') => return Ok(None),
            _ => return Err(BAD),
        }))
    }
}

/// Writes data as one chunk; nothing of no data, which would be the last chunk.
pub fn put_chunk(data: &[u8], out: &mut Vec<u8>) {
    if data.is_empty() {
        return;
    }
    // A Vec takes whatever is written to it.
    let _ = write!(out, "{:x}\r\n", data.len());
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

/// Returns true for a byte of a field's name (RFC 9110, 5.6.2).
pub fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns what is passed on of a chunked body given in pieces of `size`, how much of `bytes` it was, and whether it
    /// ended; none when it is malformed.
    fn chunked(bytes: &[u8], size: usize, keep: Keep) -> Option<(Vec<u8>, usize, bool)> {
        let (mut body, mut at, mut out) = (BodyFraming::CHUNKED, 0, Vec::new());
        for piece in bytes.chunks(size) {
            let mut piece = piece.to_vec();
            let taken = body.take(&mut piece, keep).ok()?;
            out.extend_from_slice(&piece[..taken.kept]);
            at += taken.used;
            if taken.used < piece.len() {
                break;
            }
        }
        Some((out, at, body.has_ended()))
    }

    #[test]
    fn a_chunked_body_ends_where_it_ends_and_its_heads_are_written_anew() {
        let whole =
            b"5\r\nhello\r\nA;name=\"v\"\r\n0123456789\r\n3 \t\r\nabc\r\n2 ; a = b;=\r\nde\r\n0\r\nx-sum: 1\r\n\r\nGET / next";
        let end = whole.len() - "GET / next".len();
        let anew = "5\r\nhello\r\nA\r\n0123456789\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 1\r\n\r\n";
        for size in 1..=whole.len() {
            assert_eq!(chunked(whole, size, Keep::Framed), Some((anew.into(), end, true)), "in pieces of {size}");
            let data = b"hello0123456789abcde".to_vec();
            assert_eq!(chunked(whole, size, Keep::Data), Some((data, end, true)), "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        for bad in [
            "\r\n",
            "5 \n",
            "g\r\n",
            "-1\r\n",
            "5\nhello",
            "5\r\nhelloX",
            "5\r\nhello\nX",
            "0\r\n\n",
            "0\r\nx\n",
            "1000000000000000\r\n",
            "0x5\r\n",
            "5;a\nb\r\n",
            "0\r\n\rX",
            "5 6\r\n",
            "5\tabc\r\n",
            " 5\r\n",
            "5 \t6",
            "0\r\n folded: 1\r\n",
            "0\r\nno colon\r\n",
            "0\r\n: empty\r\n",
            "5\x0b\r\n",
        ] {
            assert_eq!(chunked(bad.as_bytes(), 1, Keep::Framed), None, "{bad:?}");
        }
        let endless = format!("5;{}", "a".repeat(10_000));
        assert_eq!(chunked(endless.as_bytes(), 100, Keep::Framed), None);
        let blank = format!("5{}", " ".repeat(10_000));
        assert_eq!(chunked(blank.as_bytes(), 100, Keep::Framed), None);
        let trailers = format!("0\r\n{}", "a: b\r\n".repeat(3_000));
        assert_eq!(chunked(trailers.as_bytes(), 100, Keep::Framed), None);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_taken_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), size in 1usize..50) {
            let _ = chunked(&bytes, size, Keep::Framed);
            let _ = chunked(&bytes, size, Keep::Data);
        }

        #[test]
        fn chunks_are_found_however_they_arrive(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..5),
            size in 1usize..700,
        ) {
            let (mut bytes, mut anew) = (Vec::new(), Vec::new());
            for part in &parts {
                bytes.extend(format!("{:x};odd =\"\r\n", part.len()).bytes());
                bytes.extend(part);
                bytes.extend(b"\r\n");
                put_chunk(part, &mut anew);
            }
            bytes.extend(b"0\r\n\r\n");
            anew.extend(b"0\r\n\r\n");
            let end = bytes.len();
            bytes.extend(b"more");
            prop_assert_eq!(chunked(&bytes, size, Keep::Framed), Some((anew, end, true)));
            prop_assert_eq!(chunked(&bytes, size, Keep::Data), Some((parts.concat(), end, true)));
        }
    }
}
