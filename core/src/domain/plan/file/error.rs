//! What can be wrong with the values of a rollout file.

use crate::domain::ids::VersionId;
use crate::domain::limits::{self, OutOfRange};
use crate::domain::weights::WeightError;

/// A value of a rollout file that is not allowed.
#[derive(Debug, thiserror::Error)]
pub enum ValueError {
    /// The file is of another kind or of another version.
    #[error("{key}: found {found:?}, expected {expected:?}")]
    OtherFile {
        /// Key: `apiVersion` or `kind`.
        key: &'static str,
        /// Value found.
        found: String,
        /// The only value that this program reads.
        expected: &'static str,
    },
    /// A version's server has an address that can't be used.
    #[error("{key}: {problem}")]
    Server {
        /// Key of the version.
        key: &'static str,
        /// What is wrong with the address.
        problem: UrlError,
    },
    /// A version has servers, and is said to be answered for by nodes.
    #[error("{key}: found a url and `answer: node`, expected one of them")]
    AnswerAndServers {
        /// Key of the version.
        key: &'static str,
    },
    /// A step is not allowed.
    #[error("spec.steps: step {number}: {problem}")]
    Step {
        /// Number of the step in the file, from 1.
        number: usize,
        /// What is wrong with the step.
        problem: StepProblem,
    },
    /// The rules of the analysis are not allowed.
    #[error("spec.analysis: {0}")]
    Analysis(#[from] AnalysisProblem),
    /// A name that no header or cookie can have.
    #[error("{key}: header {found:?} is not a header name, expected letters, digits and hyphens")]
    HeaderName {
        /// Key of the name.
        key: &'static str,
        /// Name found.
        found: String,
    },
    /// Requests are hashed on nothing, or on two things.
    #[error("spec.routing.hashOn: expected one of header, cookie and clientAddress: true")]
    HashOn,
    /// A salt is asked for with the function that knows none.
    #[error(
        "spec.routing.hashOn: found salt: rollout with function: xxh64, which assigns users exactly as Envoy does, \
         expected function: xxh3, or no salt"
    )]
    SaltedXxh64,
    /// A cookie is set that nothing is hashed on, or kept that isn't set.
    #[error(
        "spec.routing.hashOn: set is for a cookie, and maxAge for one that is set: expected {{ cookie: NAME, set: true }}"
    )]
    SetCookie,
    /// A recorded slot without the salt that it is for.
    #[error("spec.routing.hashOn: found saltSlot, which the cluster writes, without salt: rollout beside it")]
    SaltSlot,
    /// The mirrored share is no weight.
    #[error("spec.routing.mirror: {0}")]
    Mirror(WeightError),
}

/// Why a step is not allowed.
#[derive(Debug, thiserror::Error)]
pub enum StepProblem {
    /// A number is no weight, or the weights are no split.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The weights name a version that the rollout does not have.
    #[error("weights name {found}, expected {stable} and {canary}")]
    Version {
        /// Version found.
        found: VersionId,
        /// The rollout's stable version.
        stable: VersionId,
        /// The rollout's canary version.
        canary: VersionId,
    },
    /// The step has none of its three keys, or several.
    #[error("expected one of setWeight, weights and pause")]
    NotOne,
}

/// Why rules of the analysis are not allowed.
#[derive(Debug, thiserror::Error)]
pub enum AnalysisProblem {
    /// A number beyond its limits.
    #[error(transparent)]
    Number(#[from] OutOfRange),
    /// Two metrics have the same name.
    #[error("two metrics have one name, expected a name for each, such as errors and errors-vs-stable")]
    SameName,
    /// Errors of one rollout would be counted in two ways.
    #[error("metrics have different classes, expected the same in each metric of errors by THRESHOLD")]
    Classes,
    /// A metric of the cluster's own with a name that says nothing about what is measured.
    #[error("metric {0:?} is unknown, expected errors, latency, or one of them with more after a dash")]
    Unknown(String),
    /// A metric whose values are not allowed.
    #[error("metric {name}: {problem}")]
    Metric {
        /// Name of the metric.
        name: String,
        /// What is wrong with it.
        problem: MetricProblem,
    },
}

/// Why the values of a metric are not allowed.
#[derive(Debug, thiserror::Error)]
pub enum MetricProblem {
    /// A number beyond its limits.
    #[error(transparent)]
    Number(#[from] OutOfRange),
    /// A word that is none of those that the key knows.
    #[error("{key} is {found:?}, expected {expected}")]
    Word {
        /// Key: `strategy` or `statistic`.
        key: &'static str,
        /// Word found.
        found: String,
        /// The words that the key knows.
        expected: &'static str,
    },
    /// Keys of another strategy or of another kind of metric; names both kinds of keys.
    #[error("{0}")]
    ForeignKeys(&'static str),
    /// A metric of the cluster's own without the one limit that THRESHOLD needs.
    #[error("no thresholdRange with a max alone, expected {{ max: … }}")]
    NoMax,
    /// A metric of another system without any limit.
    #[error("no thresholdRange, expected {{ min: …, max: … }} or one of them")]
    NoRange,
    /// A highest error rate that is no percentage.
    #[error("thresholdRange.max is {0}, expected 0 to 100 percent, two decimals")]
    ErrorRate(f64),
    /// The classes of errors leave out those that are errors in any case.
    #[error("classes don't have 5xx, expected it: [5xx], [5xx, 4xx] or [5xx, 4xx, 3xx]")]
    NoServerErrors,
    /// The other system has an address that can't be used.
    #[error("provider: {0}")]
    Provider(#[from] UrlError),
    /// The query to the other system is empty or too long.
    #[error("the provider's query is empty or longer than {max} bytes, expected PromQL", max = limits::QUERY_BYTES_MAX)]
    QueryLength,
    /// The query has a word in braces that nothing is put in place of.
    #[error("the query has {{{{{0}}}}}, expected {{{{service}}}}, {{{{stable}}}}, {{{{version}}}} or {{{{window}}}}")]
    QueryWord(String),
}

/// An address of a server, given here, that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// It is no URL.
    #[error("url {0:?}: {1}, expected http://host:port")]
    Malformed(String, http::uri::InvalidUri),
    /// It has no port, or a user or a fragment.
    #[error("url {0:?} is not a plain address, expected http://host:port")]
    NotPlain(String),
    /// It asks for TLS.
    #[error("url {0:?} is https, expected http: upstream TLS is not available yet")]
    Https(String),
    /// It has no scheme, or an unknown one.
    #[error("url {0:?} has no scheme, expected http://host:port")]
    NoScheme(String),
    /// It has a path or a query.
    #[error("url {0:?} has a path, expected http://host:port: requests keep their own path")]
    HasPath(String),
}
