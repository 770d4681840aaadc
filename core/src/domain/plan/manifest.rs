//! A rollout as the log keeps it: its file as canonical JSON.
//!
//! What users write is self-describing, so that a build with more keys and one with fewer read the same record. The text is the
//! authority: it is stored, sent and hashed as it was written, whatever this build knows of it.

use std::ops::Deref;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::file::{RolloutFile, ValueError};
use super::known;
use super::{RolloutSpec, SpecError};
use crate::domain::limits::SPEC_BYTES_MAX;

/// Version of the rules by which the text is read. A key that may be left out needs no new one; a key that means something else,
/// or a value that the build before refuses, does.
pub const SCHEMA: u16 = 1;

/// A checked rollout and the canonical JSON of its file. Reads like the rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Manifest {
    stored: Stored,
    spec: RolloutSpec,
    unknown: Vec<String>,
}

/// What is stored and sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    schema: u16,
    /// Objects with their keys in order, and no blanks.
    json: String,
    /// BLAKE3 of the JSON.
    digest: [u8; 32],
}

/// Reason for which bytes are no rollout.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A later build wrote it by rules that this one doesn't know.
    #[error("rollout has schema {found}, expected 1 to {SCHEMA}: a later build wrote it, upgrade this node")]
    Schema {
        /// The schema found.
        found: u16,
    },
    /// The text is too long, no JSON, or has other keys or types than a rollout file.
    #[error("rollout is malformed: {0}")]
    Shape(String),
    /// The text is not in its canonical form.
    #[error("rollout is not canonical JSON, expected keys in order and no blanks")]
    NotCanonical,
    /// The digest is another text's.
    #[error("rollout has another digest than its text")]
    Digest,
    /// A value is not allowed.
    #[error("rollout: {0}")]
    Value(#[from] ValueError),
    /// The values together are not a valid rollout.
    #[error("rollout: {0}")]
    Whole(#[from] SpecError),
}

impl Manifest {
    /// Returns the manifest of a rollout whose values are each valid, or the rule that they break together.
    pub(super) fn of(spec: &RolloutSpec) -> Result<Self, SpecError> {
        let value = serde_json::to_value(RolloutFile::of(spec)).expect("a rollout file is JSON");
        let json = value.to_string();
        if json.len() > SPEC_BYTES_MAX {
            return Err(SpecError::TooMany { what: "bytes of the rollout", found: json.len(), max: SPEC_BYTES_MAX });
        }
        let digest = *blake3::hash(json.as_bytes()).as_bytes();
        // Read back: every node has what is read from the text, to the last bit, this one too.
        Self::try_from(Stored { schema: SCHEMA, json, digest }).map_err(|error| match error {
            ManifestError::Whole(error) => error,
            other => SpecError::Unwritable(other.to_string()),
        })
    }

    /// Returns the rollout file as canonical JSON: keys in order, every default written out.
    pub fn json(&self) -> &str {
        &self.stored.json
    }

    /// Returns the file as a value.
    pub fn value(&self) -> Value {
        serde_json::from_str(&self.stored.json).expect("the text was read before")
    }

    /// Returns the BLAKE3 of [`Self::json`].
    pub fn digest(&self) -> [u8; 32] {
        self.stored.digest
    }

    /// Returns the path of a key that a later build wrote and this one doesn't know, if there is one: such a rollout is stored
    /// and handed on, and this node neither votes for it nor serves its canary.
    pub fn known(&self) -> Result<(), UnknownKey> {
        self.unknown.first().map_or(Ok(()), |key| Err(UnknownKey(key.clone())))
    }
}

/// A key of a rollout that this build doesn't know, by its path, such as `spec.routing.salt`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("build {build} doesn't know {0} of the rollout, expected a build that does: upgrade this node", build = env!("CARGO_PKG_VERSION"))]
pub struct UnknownKey(pub String);

impl Deref for Manifest {
    type Target = RolloutSpec;

    fn deref(&self) -> &RolloutSpec {
        &self.spec
    }
}

impl TryFrom<Stored> for Manifest {
    type Error = ManifestError;

    fn try_from(stored: Stored) -> Result<Self, ManifestError> {
        if !(1..=SCHEMA).contains(&stored.schema) {
            return Err(ManifestError::Schema { found: stored.schema });
        }
        if stored.json.len() > SPEC_BYTES_MAX {
            return Err(ManifestError::Shape(format!(
                "{} bytes, expected at most {SPEC_BYTES_MAX}",
                stored.json.len()
            )));
        }
        if stored.digest != *blake3::hash(stored.json.as_bytes()).as_bytes() {
            return Err(ManifestError::Digest);
        }
        let shape = |error: serde_json::Error| ManifestError::Shape(error.to_string());
        let value: Value = serde_json::from_str(&stored.json).map_err(shape)?;
        let canonical = value.to_string();
        if canonical != stored.json {
            return Err(ManifestError::NotCanonical);
        }
        let (file, unknown) = known::read::<RolloutFile>(&value).map_err(shape)?;
        let spec = file.spec()?;
        spec.check()?;
        Ok(Self { stored, spec, unknown })
    }
}

impl From<Manifest> for Stored {
    fn from(manifest: Manifest) -> Self {
        manifest.stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::analysis::{Analysis, Limit, Metric, Statistic};
    use crate::domain::assignment::Salt;
    use crate::domain::plan::{HashOn, HealthCheck, Match, OnPartition, RequestLimits, SetCookie, Timeouts};
    use crate::domain::verdict::OnFailure;
    use crate::domain::weights::Weight;
    use crate::fixtures;
    use crate::protocol::codec;

    /// A rollout that uses every key.
    fn every_key() -> RolloutSpec {
        let mut spec = fixtures::rollout(
            &[fixtures::held(0, 90_000), fixtures::manual(525), fixtures::held(10_000, 0)],
            fixtures::by_query(),
        );
        spec.labels.insert("team".into(), "fraud".into());
        spec.annotations.insert("kubectl.kubernetes.io/last-applied".into(), "{\"a\": 1}".into());
        spec.stable.urls = vec!["http://127.0.0.1:9101".into(), "h2c://127.0.0.1:9102".into()];
        spec.canary.health_check = Some(HealthCheck { path: "/ok".into(), interval_ms: 2_500 });
        spec.hash_on = Some(HashOn::Cookie("Sid".into()));
        spec.salt = Salt::Rollout(Some(17));
        spec.set_cookie = Some(SetCookie { max_age_ms: Some(3_600_000) });
        spec.timeouts = Timeouts { first_byte_ms: Some(1), idle_ms: Some(90_000), total_ms: Some(0) };
        spec.cancel_on_disconnect = true;
        spec.matches = vec![Match { headers: vec![("x-canary".into(), "always".into())] }];
        spec.mirror = Weight::from_bp(1_250).unwrap();
        spec.limits = RequestLimits {
            max_requests: Some(400),
            max_requests_per_server: Some(32),
            max_pending: 7,
            pending_timeout_ms: 1_500,
        };
        spec.slow_start_ms = 30_000;
        spec.on_partition = OnPartition::Hold;
        let metric = |name: &str, limit, on_failure| Metric { name: name.into(), limit, on_failure };
        let latency = |bp, max_us| Limit::Latency { statistic: Statistic::Quantile(bp), max_us };
        spec.analysis.metrics = vec![
            metric("errors", Limit::ErrorRate { max_bp: 333 }, OnFailure::Pause),
            metric("latency-tail", latency(9_990, 1_234_567), OnFailure::Rollback),
            metric("errors-vs-stable", Limit::ErrorsVsStable { increase_ppm: 5_001 }, OnFailure::Rollback),
            metric(
                "latency-vs-stable",
                Limit::LatencyVsStable { quantile_bp: 9_001, increase_ppm: 123_457 },
                OnFailure::Rollback,
            ),
        ];
        spec.error_classes.client = true;
        spec.analysis.inconclusive_after_ms = Some(61_001);
        spec.analysis.queries[0].min = Some(-1_500_001);
        spec
    }

    #[test]
    fn what_is_read_back_from_the_text_is_the_same_rollout() {
        for spec in [every_key(), fixtures::rollout(&[fixtures::held(10_000, 0)], Analysis::default())] {
            let manifest = spec.checked().unwrap();
            assert_eq!(*manifest, spec);
            assert_eq!(codec::decode::<Manifest>(&codec::encode(&manifest)).unwrap(), manifest);
        }
    }

    #[test]
    fn the_text_says_every_default() {
        let spec = fixtures::rollout(&[fixtures::held(10_000, 0)], Analysis::default());
        let value = spec.checked().unwrap().value();
        let wanted = serde_json::json!({
            "apiVersion": "aviary/v1", "kind": "Rollout", "metadata": {"name": "s"},
            "spec": {
                "stable": {"version": "v1"}, "canary": {"version": "v2"},
                "steps": [{"setWeight": 100.0}], "bake": {"duration": "1m"}, "routing": {},
                "analysis": {
                    "window": "30s", "alpha": 0.01, "minSamples": 100, "noData": "hold",
                    "metrics": [
                        {"name": "errors", "strategy": "THRESHOLD", "thresholdRange": {"max": 5.0}, "onFailure": "rollback"},
                        {"name": "latency", "strategy": "THRESHOLD", "statistic": "mean",
                         "thresholdRange": {"max": 500.0}, "onFailure": "pause"},
                    ],
                },
                "safety": {"lease": "2s", "onPartition": "stable"}, "progressDeadline": "30m",
            },
        });
        assert_eq!(value, wanted);
    }

    fn stored(schema: u16, json: &str) -> Stored {
        Stored { schema, json: json.into(), digest: *blake3::hash(json.as_bytes()).as_bytes() }
    }

    #[test]
    fn a_later_builds_key_is_kept_and_told() {
        let mut value = every_key().checked().unwrap().value();
        value["spec"]["routing"]["salt"] = "x".into();
        let json = value.to_string();
        let read: Manifest = codec::decode(&codec::encode(&stored(SCHEMA, &json))).unwrap();
        assert_eq!((read.json(), &*read), (json.as_str(), &every_key()), "kept, and the rest is read");
        let complaint = read.known().unwrap_err().to_string();
        assert!(complaint.contains("doesn't know spec.routing.salt of the rollout"), "{complaint}");
        assert_eq!(codec::encode(&read), codec::encode(&stored(SCHEMA, &json)), "handed on as it came");
    }

    #[test]
    fn what_no_build_of_ours_wrote_is_refused() {
        let good = every_key().checked().unwrap().json().to_string();
        let refused = |stored: Stored| Manifest::try_from(stored).unwrap_err();
        assert!(matches!(refused(stored(SCHEMA + 1, &good)), ManifestError::Schema { found: 2 }));
        assert!(matches!(refused(stored(0, &good)), ManifestError::Schema { found: 0 }));
        assert!(matches!(refused(stored(SCHEMA, &good.replacen(':', ": ", 1))), ManifestError::NotCanonical));
        assert!(matches!(refused(Stored { digest: [7; 32], ..stored(SCHEMA, &good) }), ManifestError::Digest));
        let falling = good.replace("\"setWeight\":100.0", "\"setWeight\":1.0");
        assert!(matches!(refused(stored(SCHEMA, &falling)), ManifestError::Whole(SpecError::Falling { .. })));
        let heavy = good.replace("\"setWeight\":100.0", "\"setWeight\":101.0");
        assert!(matches!(refused(stored(SCHEMA, &heavy)), ManifestError::Value(_)));
        let other = good.replace("\"v2\"", "\"v1\"");
        assert!(matches!(refused(stored(SCHEMA, &other)), ManifestError::Whole(SpecError::SameVersion(_))));
        assert!(matches!(refused(stored(SCHEMA, "{}")), ManifestError::Shape(_)));
        let long = format!("\"{}\"", "x".repeat(SPEC_BYTES_MAX));
        assert!(matches!(refused(stored(SCHEMA, &long)), ManifestError::Shape(_)));
    }
}
