//! Traffic weights in basis points, and the pick of a version for one request.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ids::VersionId;

/// A share of traffic in basis points (1 bp = 0.01 %), 0 to [`Weight::WHOLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Weight(u16);

/// Why a number is not a weight, or weights are no split.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WeightError {
    /// A weight of more than 10000 bp, in basis points.
    #[error("weight is {0} bp, expected 0 to 10000 bp")]
    Range(u32),
    /// Percent outside 0 to 100, or finer than two decimals.
    #[error("weight is {0} %, expected 0 to 100 with at most two decimals")]
    Percent(f64),
    /// The parts don't make a whole.
    #[error("weights sum to {0} bp, expected 10000 bp")]
    Sum(u32),
    /// The same version is listed more than once.
    #[error("version {0} is listed twice in the weights, expected once")]
    Twice(VersionId),
}

impl Weight {
    /// All traffic, in basis points.
    pub const WHOLE: u16 = 10_000;
    /// 0 bp: none of the traffic.
    pub const ZERO: Self = Self(0);
    /// 10000 bp: all of the traffic.
    pub const FULL: Self = Self(Self::WHOLE);

    /// Returns the weight of `bp` basis points.
    pub const fn from_bp(bp: u16) -> Result<Self, WeightError> {
        if bp > Self::WHOLE { Err(WeightError::Range(bp as u32)) } else { Ok(Self(bp)) }
    }

    /// Returns the weight of `percent` (0 to 100, at most two decimals): the form people write.
    pub fn from_percent(percent: f64) -> Result<Self, WeightError> {
        let bp = (percent * 100.0).round();
        let exact = (percent * 100.0 - bp).abs() < 1e-6;
        if !(0.0..=f64::from(Self::WHOLE)).contains(&bp) || !exact {
            return Err(WeightError::Percent(percent));
        }
        Ok(Self(bp as u16))
    }

    /// Returns the weight in basis points.
    pub const fn bp(self) -> u16 {
        self.0
    }

    /// Returns the weight as a fraction, 0.0 to 1.0: the form `/routing/state` shows.
    pub fn fraction(self) -> f64 {
        f64::from(self.0) / f64::from(Self::WHOLE)
    }

    /// Returns what is left of the whole.
    pub const fn rest(self) -> Self {
        Self(Self::WHOLE - self.0)
    }
}

impl TryFrom<u16> for Weight {
    type Error = WeightError;
    fn try_from(bp: u16) -> Result<Self, WeightError> {
        Self::from_bp(bp)
    }
}

impl From<Weight> for u16 {
    fn from(weight: Weight) -> u16 {
        weight.0
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) = (self.0 / 100, self.0 % 100);
        match part {
            0 => f.pad(&format!("{whole}%")),
            _ => f.pad(format!("{whole}.{part:02}").trim_end_matches('0')).and_then(|()| f.write_str("%")),
        }
    }
}

/// Traffic split between versions.
///
/// Invariant: versions unique, parts sum to [`Weight::WHOLE`]; checked once, in [`Weights::new`].
///
/// In JSON an object of shares, `{"v1": 0.95, "v2": 0.05}`; in the log a list, stable first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weights(Vec<(VersionId, Weight)>);

impl Weights {
    /// Returns the split, or why the parts are none.
    pub fn new(parts: Vec<(VersionId, Weight)>) -> Result<Self, WeightError> {
        let sum: u32 = parts.iter().map(|(_, w)| u32::from(w.bp())).sum();
        if sum != u32::from(Weight::WHOLE) {
            return Err(WeightError::Sum(sum));
        }
        for (i, (version, _)) in parts.iter().enumerate() {
            if parts[..i].iter().any(|(other, _)| other == version) {
                return Err(WeightError::Twice(version.clone()));
            }
        }
        Ok(Self(parts))
    }

    /// Returns the split that sends everything to one version.
    pub fn all_to(version: VersionId) -> Self {
        Self(vec![(version, Weight::FULL)])
    }

    /// Returns the split of a rollout: `canary` gets `weight`, `stable` the rest. The two must differ.
    pub fn between(stable: VersionId, canary: VersionId, weight: Weight) -> Self {
        assert_ne!(stable, canary, "a rollout has two different versions");
        Self(vec![(stable, weight.rest()), (canary, weight)])
    }

    /// Returns the version that serves `ticket`, a uniform draw in `0..Weight::WHOLE`.
    ///
    /// The last version (the canary) gets the lowest tickets, so that raising its weight never takes a ticket away
    /// from it: sticky assignment is monotone.
    pub fn pick(&self, ticket: u16) -> &VersionId {
        assert!(ticket < Weight::WHOLE, "ticket {ticket} out of range");
        let mut below = 0;
        for (version, weight) in self.0.iter().rev() {
            below += weight.bp();
            if ticket < below {
                return version;
            }
        }
        unreachable!("weights sum to the whole")
    }

    /// Returns the weight of `version`; zero when it has none.
    pub fn of(&self, version: &VersionId) -> Weight {
        self.0.iter().find(|(v, _)| v == version).map_or(Weight::ZERO, |(_, w)| *w)
    }

    /// Returns the parts, stable first.
    pub fn iter(&self) -> impl Iterator<Item = &(VersionId, Weight)> {
        self.0.iter()
    }
}

impl JsonSchema for Weights {
    fn schema_name() -> Cow<'static, str> {
        "Weights".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Traffic split between versions: the share of each, 0.0 to 1.0. The shares sum to 1.",
            "type": "object", "additionalProperties": { "type": "number", "minimum": 0, "maximum": 1 },
        })
    }
}

impl Serialize for Weights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.collect_map(self.0.iter().map(|(version, weight)| (version, weight.fraction()))),
            false => self.0.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Weights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let parts = match deserializer.is_human_readable() {
            true => {
                let shares = BTreeMap::<VersionId, f64>::deserialize(deserializer)?;
                let part = |(version, share): (VersionId, f64)| Ok((version, Weight::from_percent(share * 100.0)?));
                shares.into_iter().map(part).collect::<Result<_, WeightError>>().map_err(D::Error::custom)?
            }
            false => Vec::deserialize(deserializer)?,
        };
        Self::new(parts).map_err(D::Error::custom)
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (version, weight)) in self.0.iter().enumerate() {
            let gap = if i == 0 { "" } else { " " };
            write!(f, "{gap}{version}={weight}")?;
        }
        Ok(())
    }
}

/// Returns the ticket of a sticky key: the same on every node, without state.
pub fn sticky_ticket(service_salt: u64, key: &[u8]) -> u16 {
    (xxhash_rust::xxh3::xxh3_64_with_seed(key, service_salt) % u64::from(Weight::WHOLE)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(text: &str) -> VersionId {
        VersionId::new(text).unwrap()
    }

    #[test]
    fn weights_that_do_not_sum_say_what_they_sum_to() {
        let parts = vec![(id("v1"), Weight::from_bp(8500).unwrap()), (id("v2"), Weight::from_bp(500).unwrap())];
        assert_eq!(Weights::new(parts).unwrap_err().to_string(), "weights sum to 9000 bp, expected 10000 bp");
    }

    #[test]
    fn people_read_shares_and_the_log_a_list() {
        let weights = Weights::between(id("v1"), id("v2"), Weight::from_bp(1250).unwrap());
        let json = serde_json::to_string(&weights).unwrap();
        assert_eq!(json, r#"{"v1":0.875,"v2":0.125}"#);
        assert_eq!(serde_json::from_str::<Weights>(&json).unwrap(), weights);
        assert!(serde_json::from_str::<Weights>(r#"{"v1":0.5}"#).unwrap_err().to_string().contains("sum to 5000 bp"));
        let bytes = crate::protocol::codec::encode(&weights);
        assert_eq!(bytes, crate::protocol::codec::encode(&vec![("v1", 8750u16), ("v2", 1250)]));
        assert_eq!(crate::protocol::codec::decode::<Weights>(&bytes).unwrap(), weights);
    }

    #[test]
    fn percent_has_two_decimals() {
        assert_eq!(Weight::from_percent(0.01).unwrap().bp(), 1);
        assert_eq!(Weight::from_percent(5.0).unwrap().to_string(), "5%");
        assert_eq!(Weight::from_percent(12.5).unwrap().to_string(), "12.5%");
        assert!(Weight::from_percent(0.001).is_err());
        assert!(Weight::from_percent(100.01).is_err());
        assert!(Weight::from_percent(f64::NAN).is_err());
    }

    proptest! {
        #[test]
        fn every_ticket_goes_to_one_version_in_proportion(bp in 0u16..=10_000) {
            let weights = Weights::between(id("v1"), id("v2"), Weight::from_bp(bp).unwrap());
            let canary = (0..Weight::WHOLE).filter(|t| weights.pick(*t) == &id("v2")).count();
            prop_assert_eq!(canary, usize::from(bp));
        }

        #[test]
        fn raising_the_weight_never_sends_a_user_back(low in 0u16..=10_000, more in 0u16..=10_000, ticket in 0u16..10_000) {
            let high = low.saturating_add(more).min(10_000);
            let at = |bp| Weights::between(id("v1"), id("v2"), Weight::from_bp(bp).unwrap()).pick(ticket).clone();
            prop_assert!(at(low) == id("v1") || at(high) == id("v2"));
        }
    }
}
