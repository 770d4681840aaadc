//! Events as `aviary.v1.TelemetryEvent`, read by hand: a general decoder takes a multiple of the time, and this runs for millions
//! of events a minute.

use super::{Raw, Rejection, ReportedEvent, Text};

impl<'b> ReportedEvent<'b> {
    /// Reads one `aviary.v1.TelemetryEvent` from its bytes.
    #[inline]
    pub fn from_protobuf(bytes: &'b [u8]) -> Result<Self, Rejection> {
        ProtobufFields(bytes).event().map_err(Broken::rejection)?.checked()
    }
}

/// The wire types of protobuf.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LENGTH: u8 = 2;
const FIXED32: u8 = 5;

/// Reason for which a message can't be read. It is small, because each step of reading returns one, or none.
#[derive(Debug, Clone, Copy)]
enum Broken {
    FieldZero,
    EndlessNumber,
    CutOff,
    NoText,
    WireType,
    Time,
}

impl Broken {
    #[cold]
    fn rejection(self) -> Rejection {
        let what = match self {
            Self::FieldZero => "field 0",
            Self::EndlessNumber => "a number that doesn't end",
            Self::CutOff => "a field that is cut off",
            Self::NoText => "a text that is no UTF-8",
            Self::WireType => "a wire type that this schema doesn't have",
            Self::Time => "event_time outside 1970 to 9999",
        };
        Rejection::Malformed(format!("{what}, expected an aviary.v1.TelemetryEvent"))
    }
}

/// Bytes of a message that are not read yet.
struct ProtobufFields<'b>(&'b [u8]);

impl<'b> ProtobufFields<'b> {
    /// Reads an event to its end.
    #[inline]
    fn event(mut self) -> Result<Raw<'b>, Broken> {
        let mut raw = Raw::default();
        while let Some((field, kind)) = self.tag()? {
            match (field, kind) {
                (1, LENGTH) => raw.service = self.text()?,
                (2, LENGTH) => raw.version = self.text()?,
                (3, VARINT) => raw.status = self.varint()?,
                (4, FIXED64) => raw.latency_ms = f64::from_bits(self.fixed64()?),
                (5, LENGTH) => raw.at_ms = ProtobufFields(self.bytes()?).timestamp_ms()?,
                (6, LENGTH) => raw.id = self.text()?,
                (_, kind) => self.skip(kind)?,
            }
        }
        Ok(raw)
    }

    /// Returns the next field's number and wire type; none at the end.
    #[inline]
    fn tag(&mut self) -> Result<Option<(u64, u8)>, Broken> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        match tag >> 3 {
            0 => Err(Broken::FieldZero),
            field => Ok(Some((field, (tag & 7) as u8))),
        }
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, Broken> {
        if let [byte, rest @ ..] = self.0
            && *byte < 0x80
        {
            self.0 = rest;
            return Ok(u64::from(*byte));
        }
        let Some(eight) = self.0.first_chunk() else { return self.long_varint() };
        // All bytes at once: the last has no high bit, and each holds seven bits.
        let all = u64::from_le_bytes(*eight);
        let ends = !all & 0x8080_8080_8080_8080;
        if ends == 0 {
            return self.long_varint();
        }
        self.0 = &self.0[ends.trailing_zeros() as usize / 8 + 1..];
        let own = all & (ends ^ (ends - 1)) & 0x7f7f_7f7f_7f7f_7f7f;
        let pairs = own & 0x007f_007f_007f_007f | (own & 0x7f00_7f00_7f00_7f00) >> 1;
        let fours = pairs & 0x0000_3fff_0000_3fff | (pairs & 0x3fff_0000_3fff_0000) >> 2;
        Ok(fours & 0x0fff_ffff | (fours & 0x0fff_ffff_0000_0000) >> 4)
    }

    /// Reads a number that is longer than eight bytes, or nearer to the end.
    fn long_varint(&mut self) -> Result<u64, Broken> {
        let (mut value, mut rest) = (0, self.0);
        for shift in (0..64).step_by(7) {
            let (byte, after) = rest.split_first().ok_or(Broken::EndlessNumber)?;
            (value, rest) = (value | u64::from(byte & 0x7f) << shift, after);
            if *byte < 0x80 {
                self.0 = rest;
                return Ok(value);
            }
        }
        Err(Broken::EndlessNumber)
    }

    #[inline]
    fn take(&mut self, length: usize) -> Result<&'b [u8], Broken> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Broken::CutOff)?;
        self.0 = rest;
        Ok(taken)
    }

    #[inline]
    fn bytes(&mut self) -> Result<&'b [u8], Broken> {
        let length = self.varint()?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    #[inline(always)]
    fn text(&mut self) -> Result<Text<'b>, Broken> {
        Text::read(self.bytes()?).ok_or(Broken::NoText)
    }

    #[inline]
    fn fixed64(&mut self) -> Result<u64, Broken> {
        let bytes = self.take(8)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("8 bytes")))
    }

    #[cold]
    fn skip(&mut self, kind: u8) -> Result<(), Broken> {
        match kind {
            VARINT => self.varint().map(drop),
            FIXED64 => self.take(8).map(drop),
            LENGTH => self.bytes().map(drop),
            FIXED32 => self.take(4).map(drop),
            _ => Err(Broken::WireType),
        }
    }

    /// Reads a `google.protobuf.Timestamp` to its end.
    #[inline]
    fn timestamp_ms(&mut self) -> Result<u64, Broken> {
        let (mut seconds, mut nanos) = (0, 0);
        while let Some((field, kind)) = self.tag()? {
            match (field, kind) {
                (1, VARINT) => seconds = self.varint()?,
                (2, VARINT) => nanos = self.varint()?,
                (_, kind) => self.skip(kind)?,
            }
        }
        // Years before 1970 are negative, and as an unsigned number beyond any year.
        if seconds > 253_402_300_799 || nanos > 999_999_999 {
            return Err(Broken::Time);
        }
        Ok(seconds * 1000 + nanos / 1_000_000)
    }
}
