//! The file of a record router: YAML, in the words of the rollout file.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use schemars::{JsonSchema, Schema, schema_for};
use serde::Deserialize;

use super::node::Kafka;
use super::{FileError, YamlError};
use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::plan::file::{UrlError, checked_url, duration};
use crate::domain::router_state::RolloutIdentity;
use crate::domain::side::Side;
use crate::domain::weights::{Weight, WeightError};

/// Settings of a record router, read from its file and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterConfig {
    /// `metadata.name`: the rollout's name; with `follow`, its service's in the cluster.
    pub name: ServiceId,
    /// `spec.kafka`: brokers, and more properties of librdkafka.
    pub kafka: Kafka,
    /// `spec.source`: the topic that is split.
    pub source: String,
    /// `spec.stable` and `spec.canary`, in this order.
    pub services: [ServicePart; 2],
    /// `spec.weight`, in percent: the canary's share until another is asked for; default 0.
    pub weight: Weight,
    /// `spec.follow`: the cluster says what the weight is.
    pub follow: Option<Follow>,
    /// `spec.assign: key` (the default) or `random`.
    pub keyed: bool,
    /// `spec.hooks`: how services are started and stopped; default: by hand.
    pub hooks: HooksConfig,
    /// `spec.lagMax`: the canary's unread records above which the weight isn't raised; default none.
    pub lag_max: Option<u64>,
    /// `spec.changeMax`: how long a change of weight waits for keys that are never idle before it holds their partition;
    /// default 5s.
    pub change_ms_max: u64,
    /// `spec.interval`: how long a transaction takes records up; default 100ms.
    pub interval_ms: u64,
    /// `spec.batchMax`: most records in a transaction; default 20000.
    pub batch_max: usize,
    /// `spec.push`: records are posted instead of copied.
    pub push: Option<Push>,
}

/// Consumer service of one version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServicePart {
    /// Name of the version, as the cluster knows it.
    pub version: VersionId,
    /// Consumer group of the service.
    pub group: String,
    /// The topic that it is given; default SOURCE.NAME.stable or SOURCE.NAME.canary.
    #[serde(default)]
    pub topic: String,
}

/// Source of the weight: the control topic or the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Follow {
    /// API ports of the nodes, `http://host:port`; the next one is asked when one can't be reached.
    pub api: Vec<String>,
}

/// How services are started and stopped.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum HooksConfig {
    /// By people: the router says what it waits for.
    #[default]
    Manual,
    /// By a program: `PROGRAM… start|stop stable|canary TOPIC GROUP`.
    Exec {
        /// Program, and the arguments that come before the router's own.
        argv: Vec<String>,
        /// Maximum run time of a call, in milliseconds.
        timeout_ms: u64,
    },
    /// By a POST of the same words as JSON.
    Http {
        /// URL that the router posts its calls to.
        url: String,
        /// Longest wait for a 2xx answer.
        timeout_ms: u64,
    },
}

/// Records are posted to the data plane.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Push {
    /// Where to: `http://host:port/path` of a data plane.
    pub url: String,
    /// The topic of records that were refused or failed too often.
    pub dead_letter: String,
    /// How often a record is posted before that; default 10.
    #[serde(default = "attempts")]
    pub attempts: u32,
    /// Records under way at a time, of different keys; default 64.
    #[serde(default = "in_flight")]
    pub in_flight: usize,
    /// Longest wait for an answer; default 10s.
    #[serde(default = "timeout_ms", deserialize_with = "duration", rename = "timeout")]
    #[schemars(with = "String")]
    pub timeout_ms: u64,
}

fn attempts() -> u32 {
    10
}

fn in_flight() -> usize {
    64
}

fn timeout_ms() -> u64 {
    10_000
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RouterFile {
    api_version: String,
    kind: String,
    metadata: RouterMetadata,
    spec: RouterSpecPart,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RouterMetadata {
    name: ServiceId,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RouterSpecPart {
    kafka: KafkaPart,
    source: String,
    stable: ServicePart,
    canary: ServicePart,
    weight: Option<f64>,
    follow: Option<Follow>,
    #[serde(default)]
    assign: Assign,
    hooks: Option<HooksPart>,
    lag_max: Option<u64>,
    #[serde(default = "change_ms", deserialize_with = "duration")]
    #[schemars(with = "String")]
    change_max: u64,
    #[serde(default = "interval_ms", deserialize_with = "duration")]
    #[schemars(with = "String")]
    interval: u64,
    #[serde(default = "batch_max")]
    batch_max: usize,
    push: Option<Push>,
}

fn change_ms() -> u64 {
    5_000
}

fn interval_ms() -> u64 {
    100
}

fn batch_max() -> usize {
    20_000
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct KafkaPart {
    bootstrap: String,
    #[serde(default)]
    properties: BTreeMap<String, String>,
}

#[derive(Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Assign {
    #[default]
    Key,
    Random,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HooksPart {
    exec: Option<Vec<String>>,
    http: Option<String>,
    #[serde(default = "hook_ms", deserialize_with = "duration")]
    #[schemars(with = "String")]
    timeout: u64,
}

fn hook_ms() -> u64 {
    60_000
}

/// Returns the JSON Schema of a router's file.
pub fn schema() -> Schema {
    schema_for!(RouterFile)
}

/// A router's file that can't be used.
pub type RouterFileError = FileError<RouterProblem>;

/// Why a file is no router's.
#[derive(Debug, thiserror::Error)]
pub enum RouterProblem {
    /// The text holds several documents.
    #[error("the text holds {0} documents, expected one router")]
    Documents(usize),
    /// The system refused to read the file.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The text is no YAML, or has unknown or missing keys.
    #[error(transparent)]
    Shape(#[from] YamlError),
    /// The file is of another kind or of another version.
    #[error("found apiVersion {api_version:?} and kind {kind:?}, expected \"aviary/v1\" and \"Router\"")]
    OtherFile {
        /// Version found.
        api_version: String,
        /// Kind found.
        kind: String,
    },
    /// A name that Kafka refuses for a topic.
    #[error("{key} is {found:?}, expected a topic: 1 to 249 letters, digits, '.', '_' and '-'")]
    Topic {
        /// Key of the topic.
        key: String,
        /// Name found.
        found: String,
    },
    /// A URL to which nothing can be posted.
    #[error("{key} is {found:?}, expected http://host:port/path")]
    Url {
        /// Key of the URL.
        key: &'static str,
        /// URL found.
        found: String,
    },
    /// A property of the client that the router sets by itself.
    #[error(
        "spec.kafka.properties has {0}, which the router sets itself: that each record is delivered once depends on it; remove it"
    )]
    Property(String),
    /// A service without a consumer group.
    #[error("spec.{}.group is empty, expected a consumer group", .0.word())]
    NoGroup(Side),
    /// Two services share what must be their own, or one has the source for its topic.
    #[error("{what} {found} is used twice, expected a different {what} for each")]
    Twice {
        /// `version`, `group` or `topic`.
        what: &'static str,
        /// The name that is used twice.
        found: String,
    },
    /// Both the file and the cluster would say what the weight is.
    #[error("spec has weight and follow, expected one of them")]
    WeightAndFollow,
    /// The weight is none.
    #[error("spec.weight: {0}")]
    Weight(#[from] WeightError),
    /// No node to follow.
    #[error("spec.follow.api: found none, expected http://host:port of each node")]
    NoNodes,
    /// A node's address that can't be used.
    #[error("spec.follow.api: {0}")]
    Node(#[from] UrlError),
    /// Services are started in no way, or in two.
    #[error("spec.hooks: expected one of exec: [PROGRAM, …] and http: URL")]
    Hooks,
    /// A transaction that would take up nothing, or never end.
    #[error(
        "spec.batchMax and spec.interval: found {batch_max} and {interval_ms} ms, expected 1 or more, and 1 to 5000 ms"
    )]
    Transaction {
        /// Most records in a transaction.
        batch_max: usize,
        /// How long a transaction takes records up, in milliseconds.
        interval_ms: u64,
    },
    /// Records that would never be posted.
    #[error("spec.push: attempts and inFlight: found 0, expected 1 or more")]
    NoPosts,
}

impl RouterConfig {
    /// Reads and checks a router's file.
    pub fn load(path: &Path) -> Result<Self, RouterFileError> {
        let read = std::fs::read_to_string(path).map_err(RouterProblem::from);
        read.and_then(|text| Self::parse(&text)).map_err(|problem| FileError::new(path.display(), problem))
    }

    /// Reads and checks a router's file that `text` holds; errors begin with `file`.
    ///
    /// # Errors
    /// When it is no router's file, or a value is not allowed.
    pub fn of(text: &str, file: &str) -> Result<Self, RouterFileError> {
        Self::parse(text).map_err(|problem| FileError::new(file, problem))
    }

    fn parse(text: &str) -> Result<Self, RouterProblem> {
        let documents = super::documents(text);
        let text = match &documents[..] {
            [] => text,
            [one] => one,
            _ => return Err(RouterProblem::Documents(documents.len())),
        };
        let RouterFile { api_version, kind, metadata, spec } = super::read_yaml(text)?;
        if (api_version.as_str(), kind.as_str()) != ("aviary/v1", "Router") {
            return Err(RouterProblem::OtherFile { api_version, kind });
        }
        let name = metadata.name;
        checked_topic("spec.source", &spec.source)?;
        let mut services = [spec.stable, spec.canary];
        for (side, service) in Side::BOTH.iter().zip(&mut services) {
            if service.topic.is_empty() {
                service.topic = format!("{}.{name}.{}", spec.source, side.word());
            }
            checked_topic(&format!("spec.{}.topic", side.word()), &service.topic)?;
            if service.group.is_empty() {
                return Err(RouterProblem::NoGroup(*side));
            }
        }
        let [stable, canary] = &services;
        for (what, one, other) in [
            ("version", stable.version.as_str(), canary.version.as_str()),
            ("group", &stable.group, &canary.group),
            ("topic", &stable.topic, &canary.topic),
            ("topic", &stable.topic, &spec.source),
            ("topic", &canary.topic, &spec.source),
        ] {
            if one == other {
                return Err(RouterProblem::Twice { what, found: one.into() });
            }
        }
        let weight = match (spec.weight, &spec.follow) {
            (Some(_), Some(_)) => return Err(RouterProblem::WeightAndFollow),
            (percent, _) => Weight::from_percent(percent.unwrap_or(0.0))?,
        };
        let follow = spec.follow.map(checked_follow).transpose()?;
        let hooks = match spec.hooks {
            None => HooksConfig::Manual,
            Some(HooksPart { exec: Some(argv), http: None, timeout }) if !argv.is_empty() => {
                HooksConfig::Exec { argv, timeout_ms: timeout }
            }
            Some(HooksPart { exec: None, http: Some(url), timeout }) => {
                plain_http("spec.hooks.http", &url)?;
                HooksConfig::Http { url, timeout_ms: timeout }
            }
            Some(_) => return Err(RouterProblem::Hooks),
        };
        if spec.batch_max == 0 || !(1..=5_000).contains(&spec.interval) {
            return Err(RouterProblem::Transaction { batch_max: spec.batch_max, interval_ms: spec.interval });
        }
        if let Some(push) = &spec.push {
            checked_topic("spec.push.deadLetter", &push.dead_letter)?;
            plain_http("spec.push.url", &push.url)?;
            if push.attempts == 0 || push.in_flight == 0 {
                return Err(RouterProblem::NoPosts);
            }
        }
        if let Some(name) = spec.kafka.properties.keys().find(|name| OWN_PROPERTIES.contains(&name.as_str())) {
            return Err(RouterProblem::Property(name.clone()));
        }
        let kafka = Kafka { properties: spec.kafka.properties, ..Kafka::at(&spec.kafka.bootstrap) };
        Ok(Self {
            name,
            kafka,
            source: spec.source,
            services,
            weight,
            follow,
            keyed: spec.assign == Assign::Key,
            hooks,
            lag_max: spec.lag_max,
            change_ms_max: spec.change_max,
            interval_ms: spec.interval,
            batch_max: spec.batch_max,
            push: spec.push,
        })
    }

    /// Returns the service of one side.
    pub fn service(&self, side: Side) -> &ServicePart {
        &self.services[side as usize]
    }

    /// Returns whose rollout it is: its versions and groups.
    pub fn identity(&self) -> RolloutIdentity {
        let services = self.services.each_ref();
        RolloutIdentity {
            versions: services.map(|service| service.version.to_string()),
            groups: services.map(|service| service.group.clone()),
        }
    }

    /// Returns the topic of what people ask, and of what was done.
    pub fn control(&self) -> String {
        format!("{}.{}.router", self.source, self.name)
    }

    /// Returns the router's own consumer group, which is its transactional id as well.
    pub fn group(&self) -> String {
        format!("aviary-router-{}.{}", self.source, self.name)
    }
}

/// Properties that exactly-once delivery depends on.
const OWN_PROPERTIES: [&str; 14] = [
    "acks",
    "auto.offset.reset",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "enable.partition.eof",
    "group.id",
    "group.instance.id",
    "group.protocol",
    "isolation.level",
    "request.required.acks",
    "topic.auto.offset.reset",
    "transaction.timeout.ms",
    "transactional.id",
];

/// Checks the form of a topic's name (Kafka's own rule).
fn checked_topic(key: &str, name: &str) -> Result<(), RouterProblem> {
    let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match !name.is_empty() && name.len() <= 249 && name.chars().all(letters) {
        true => Ok(()),
        false => Err(RouterProblem::Topic { key: key.into(), found: name.into() }),
    }
}

fn plain_http(key: &'static str, url: &str) -> Result<(), RouterProblem> {
    let parsed = url.parse::<http::Uri>().ok();
    match parsed.filter(|url| url.scheme_str() == Some("http") && url.authority().is_some()) {
        Some(_) => Ok(()),
        None => Err(RouterProblem::Url { key, found: url.into() }),
    }
}

fn checked_follow(follow: Follow) -> Result<Follow, RouterProblem> {
    if follow.api.is_empty() {
        return Err(RouterProblem::NoNodes);
    }
    let api = follow.api.iter().map(|url| checked_url(url)).collect::<Result<_, _>>()?;
    Ok(Follow { api })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
apiVersion: aviary/v1
kind: Router
metadata: { name: orders-v2 }
spec:
  kafka: { bootstrap: 127.0.0.1:9092 }
  source: orders
  stable: { version: v1, group: orders }
  canary: { version: v2, group: orders-v2 }
  weight: 5
  hooks: { exec: [./services.sh], timeout: 30s }
";

    #[test]
    fn names_that_are_not_given_follow_from_the_source_and_the_rollout() {
        let config = RouterConfig::parse(FILE).unwrap();
        assert_eq!(config.service(Side::Canary).topic, "orders.orders-v2.canary");
        assert_eq!(
            (config.control().as_str(), config.group().as_str()),
            ("orders.orders-v2.router", "aviary-router-orders.orders-v2")
        );
        assert_eq!(config.hooks, HooksConfig::Exec { argv: vec!["./services.sh".into()], timeout_ms: 30_000 });
        assert_eq!((config.weight.bp(), config.keyed, config.batch_max), (500, true, 20_000));
    }

    #[test]
    fn what_is_wrong_is_said_with_what_was_expected() {
        for (from, to, said) in [
            ("group: orders-v2", "group: orders", "group orders is used twice"),
            ("source: orders", "source: 'all orders'", "expected a topic"),
            ("weight: 5", "weight: 5\n  follow: { api: ['http://h:1'] }", "expected one"),
            ("weight: 5", "wieght: 5", "did you mean `weight`?"),
            ("exec: [./services.sh]", "exec: []", "expected one of exec"),
            ("kind: Router", "kind: Rollout", "\"Router\""),
            (
                "127.0.0.1:9092",
                "127.0.0.1:9092, properties: { isolation.level: read_uncommitted }",
                "has isolation.level",
            ),
            ("127.0.0.1:9092", "127.0.0.1:9092, properties: { transactional.id: mine }", "remove it"),
            ("weight: 5", "follow: { api: [] }", "expected http://host:port"),
        ] {
            let error = RouterConfig::parse(&FILE.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
