//! The one way from values to bytes and back: bincode, strictly.
//!
//! bincode alone accepts trailing bytes and several spellings of one number. Here a value has exactly one encoding:
//! what does not read completely, or does not write back to the same bytes, is refused.

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use crate::domain::limits::VALUE_BYTES_MAX;

/// Why bytes are no value.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Too long to be read at all.
    #[error("value has {found} bytes, expected at most {most}")]
    Length {
        /// Length of the value's bytes.
        found: usize,
        /// Most bytes that are read.
        most: usize,
    },
    /// Not the shape of the expected type.
    #[error("malformed value: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    /// Bytes follow the end of the value.
    #[error("value ends after {used} of {total} bytes, expected all of them to be used")]
    Trailing {
        /// Bytes that the value took.
        used: usize,
        /// Bytes that were given.
        total: usize,
    },
    /// Another spelling of the same value.
    #[error("value is not in canonical form")]
    NotCanonical,
}

/// Returns the canonical bytes of a value.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, bincode::config::standard()).expect("every value of ours can be encoded")
}

/// Returns the value that `bytes` are the one encoding of, or why they are none.
pub fn decode<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    decode_within::<T, VALUE_BYTES_MAX>(bytes)
}

/// Returns the value at the front of `bytes`, and the bytes after it.
pub fn decode_first<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<(T, &[u8]), DecodeError> {
    if bytes.len() > VALUE_BYTES_MAX {
        return Err(DecodeError::Length { found: bytes.len(), most: VALUE_BYTES_MAX });
    }
    let configuration = bincode::config::standard().with_limit::<VALUE_BYTES_MAX>();
    let (value, used) = bincode::serde::decode_from_slice::<T, _>(bytes, configuration)?;
    match encode(&value) == bytes[..used] {
        true => Ok((value, &bytes[used..])),
        false => Err(DecodeError::NotCanonical),
    }
}

/// Like [`decode`], for values of up to `MOST` bytes.
pub fn decode_within<T: Serialize + DeserializeOwned, const MOST: usize>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > MOST {
        return Err(DecodeError::Length { found: bytes.len(), most: MOST });
    }
    let configuration = bincode::config::standard().with_limit::<MOST>();
    let (value, used) = bincode::serde::decode_from_slice::<T, _>(bytes, configuration)?;
    if used != bytes.len() {
        return Err(DecodeError::Trailing { used, total: bytes.len() });
    }
    if encode(&value) != bytes {
        return Err(DecodeError::NotCanonical);
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::log::record::Slot;

    #[test]
    fn trailing_bytes_and_other_spellings_are_refused() {
        let bytes = encode(&(7u64, "x".to_string()));
        assert_eq!(decode::<(u64, String)>(&bytes).unwrap(), (7, "x".into()));
        let trailing = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(decode::<(u64, String)>(&trailing), Err(DecodeError::Trailing { used: 3, total: 4 })));
        let long_seven = [251, 7, 0];
        assert!(matches!(decode::<u64>(&long_seven), Err(DecodeError::NotCanonical)));
    }

    #[test]
    fn a_slot_that_no_log_gets_to_is_refused_by_every_format() {
        let last = Slot::MAX.0;
        for (slot, is_one) in [(0, true), (last, true), (last + 1, false), (u64::MAX, false)] {
            assert_eq!(decode::<Slot>(&encode(&slot)).is_ok(), is_one, "{slot}");
            assert_eq!(serde_json::from_str::<Slot>(&slot.to_string()).is_ok(), is_one, "{slot}");
        }
        assert_eq!(encode(&Slot(70_000)), encode(&70_000u64), "written as its number");
    }

    #[test]
    fn a_length_that_promises_more_than_there_is_costs_nothing() {
        let bomb = [253, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        // Elements without a size would still be counted one by one: no message of ours has a container of them.
        assert!(decode::<Vec<u64>>(&bomb).is_err());
    }
}
