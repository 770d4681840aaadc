//! Reading a rollout file: YAML, or JSON, which is YAML.

use crate::domain::plan::file::{RolloutFile, ValueError};
use crate::domain::plan::{Manifest, SpecError};

use super::{FileError, YamlError};

/// A rollout file that can't be used.
pub type RolloutError = FileError<RolloutProblem>;

/// Why a text is no rollout.
#[derive(Debug, thiserror::Error)]
pub enum RolloutProblem {
    /// The text is no YAML, or has unknown or missing keys.
    #[error(transparent)]
    Shape(#[from] YamlError),
    /// The text holds several documents.
    #[error("the text holds {0} documents, expected one rollout")]
    Documents(usize),
    /// A value is not allowed.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The values together are not a valid rollout.
    #[error(transparent)]
    Whole(#[from] SpecError),
}

/// Returns the JSON Schema of a rollout file.
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(RolloutFile)
}

/// Returns the rollout that `text` describes; errors begin with `file`.
pub fn parse(text: &str, file: &str) -> Result<Manifest, RolloutError> {
    parse_text(text).map_err(|problem| RolloutError::new(file, problem))
}

fn parse_text(text: &str) -> Result<Manifest, RolloutProblem> {
    let documents = super::documents(text);
    let text = match &documents[..] {
        [] => text,
        [one] => one,
        _ => return Err(RolloutProblem::Documents(documents.len())),
    };
    let file: RolloutFile = super::read_yaml(text)?;
    let spec = file.spec()?;
    spec.check_answers()?;
    Ok(spec.checked()?)
}

/// Returns the rollout that a node recorded and shows as `manifest`, by whatever rules it was accepted.
pub fn recorded(manifest: &serde_json::Value) -> Result<Manifest, RolloutProblem> {
    let file: RolloutFile = super::read_yaml(&manifest.to_string())?;
    Ok(file.spec()?.checked()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::analysis::{Limit, Statistic};
    use crate::domain::assignment::{HashFunction, Salt};
    use crate::domain::plan::{HashOn, HealthCheck, OnPartition, SetCookie, Timeouts};

    const GOOD: &str = r#"
apiVersion: aviary/v1
kind: Rollout
metadata: { name: fraud-model }
spec:
  stable: { version: v1, url: "http://127.0.0.1:9101" }
  canary: { version: v2, urls: ["http://127.0.0.1:9102/", "http://127.0.0.1:9103"] }
  steps:
    - pause: {}
    - setWeight: 5
    - pause: { duration: 30s }
    - pause: { duration: 1m }
    - weights: { v1: 80, v2: 20 }
    - pause: {}
  bake: { duration: 10s }
  routing:
    hashOn: { header: X-User-ID }
    match: [ { headers: { X-Canary: { exact: always } } } ]
  analysis:
    window: 30s
    metrics:
      - { name: errors, strategy: THRESHOLD, thresholdRange: { max: 2.5 }, onFailure: rollback }
      - { name: latency, statistic: p95, thresholdRange: { max: 250 } }
    minSamples: 200
    noData: fail
    onInconclusive: { after: 10m, then: pause }
  safety: { lease: 3s, onPartition: hold }
  progressDeadline: 20m
"#;

    fn complaint(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "the case changes something");
        parse(&GOOD.replacen(from, to, 1), "r.yaml").unwrap_err().to_string()
    }

    #[test]
    fn a_whole_file_reads_as_it_was_meant() {
        let spec = parse(GOOD, "r.yaml").unwrap();
        for around in ["---", "---\n# Source: chart/rollout.yaml", "# head\n---"] {
            assert_eq!(parse(&format!("{around}{GOOD}---\n"), "r.yaml").unwrap(), spec, "{around:?}");
        }
        let stages: Vec<_> = spec.stages.iter().map(|s| (s.weight.bp(), s.hold_ms, s.manual)).collect();
        assert_eq!(stages, [(0, 0, true), (500, 90_000, false), (2000, 0, true), (10_000, 0, false)]);
        assert_eq!(spec.canary.urls, ["http://127.0.0.1:9102", "http://127.0.0.1:9103"]);
        assert_eq!(spec.hash_on, Some(HashOn::Header("x-user-id".into())));
        let routed = |from: &str, to: &str| parse(&GOOD.replacen(from, to, 1), "r.yaml").unwrap();
        assert_eq!(routed("header: X-User-ID", "cookie: Sid").hash_on, Some(HashOn::Cookie("Sid".into())));
        assert_eq!(routed("header: X-User-ID", "clientAddress: true").hash_on, Some(HashOn::ClientAddress));
        let salted = |keys: &str| {
            let spec = routed("header: X-User-ID", &format!("header: X-User-ID, {keys}"));
            (spec.hash_function, spec.salt)
        };
        assert_eq!((spec.hash_function, spec.salt), (HashFunction::Xxh3, Salt::Unsaid));
        assert_eq!(salted("salt: rollout"), (HashFunction::Xxh3, Salt::Rollout(None)));
        assert_eq!(salted("salt: rollout, saltSlot: 7"), (HashFunction::Xxh3, Salt::Rollout(Some(7))));
        assert_eq!(salted("salt: none, function: xxh64"), (HashFunction::Xxh64, Salt::None));
        let cookie = routed("header: X-User-ID", "cookie: Sid, set: true, maxAge: 1h");
        assert_eq!(cookie.set_cookie, Some(SetCookie { max_age_ms: Some(3_600_000) }));
        let session = routed("header: X-User-ID", "cookie: Sid, set: true");
        assert_eq!((session.set_cookie, spec.set_cookie), (Some(SetCookie { max_age_ms: None }), None));
        let limited =
            routed("match: [", "timeouts: { firstByte: 5s, total: 0s }\n    cancelOnDisconnect: true\n    match: [");
        let expected = Timeouts { first_byte_ms: Some(5_000), idle_ms: None, total_ms: Some(0) };
        assert_eq!((limited.timeouts, limited.cancel_on_disconnect), (expected, true));
        assert_eq!((spec.timeouts, spec.cancel_on_disconnect), (Timeouts::default(), false));
        assert_eq!(routed("match: [", "mirror: { percent: 12.5 }\n    match: [").mirror.bp(), 1_250);
        let well =
            &routed("version: v1,", "version: v1, healthCheck: { path: /ok, interval: 2s },").stable.health_check;
        assert_eq!(*well, Some(HealthCheck { path: "/ok".into(), interval_ms: 2_000 }));
        assert_eq!(spec.matches[0].headers, [("x-canary".to_string(), "always".to_string())]);
        assert_eq!((spec.lease_ms, spec.bake_ms, spec.progress_deadline_ms), (3_000, 10_000, 1_200_000));
        assert_eq!(spec.on_partition, OnPartition::Hold);
        assert_eq!(spec.analysis.metrics[0].limit, Limit::ErrorRate { max_bp: 250 });
        assert_eq!(
            spec.analysis.metrics[1].limit,
            Limit::Latency { statistic: Statistic::Quantile(9_500), max_us: 250_000 }
        );
        assert_eq!(spec.analysis.inconclusive_after_ms, Some(600_000));
    }

    #[test]
    fn a_canary_may_be_compared_with_stable() {
        let metric = "{ name: latency, statistic: p95, thresholdRange: { max: 250 } }";
        let compared = "{ name: latency-vs-stable, strategy: SEQUENTIAL, quantile: 0.9, allowedIncrease: 0.05 }";
        let text = GOOD.replace(metric, compared).replace("minSamples: 200", "alpha: 0.02");
        let analysis = &parse(&text, "r.yaml").unwrap().analysis;
        let limit = Limit::LatencyVsStable { quantile_bp: 9_000, increase_ppm: 50_000 };
        assert_eq!((analysis.metrics[1].limit, analysis.alpha_ppm), (limit, 20_000));
        let policy = analysis.sequential(7_200_000).unwrap();
        assert_eq!((policy.errors_share, policy.alpha, policy.horizon_seconds), (0.0, 0.02, 10_800.0));
        assert!(
            complaint(metric, "{ name: errors-vs-stable, strategy: SEQUENTIAL, quantile: 0.9 }")
                .contains("is for latency")
        );
        assert!(
            complaint(metric, "{ name: latency-p, strategy: SEQUENTIAL, allowedIncrease: 0 }")
                .contains("expected 0.0001 to 10")
        );
        assert_eq!(parse(GOOD, "r.yaml").unwrap().analysis.sequential(1), None);
    }

    const STABLE_URL: &str = ", url: \"http://127.0.0.1:9101\"";
    const CANARY_URLS: &str = ", urls: [\"http://127.0.0.1:9102/\", \"http://127.0.0.1:9103\"]";

    #[test]
    fn a_version_without_servers_is_refused_beside_one_with_servers() {
        let expected = "r.yaml: v1 has a url and v2 has none, expected one of both: without a server, nodes would answer for \
                        v2 themselves";
        assert_eq!(complaint(CANARY_URLS, ""), expected);
        assert_eq!(complaint(CANARY_URLS, ", urls: []"), expected);
        assert_eq!(complaint(CANARY_URLS, ", answer: node"), expected);
        assert_eq!(complaint(CANARY_URLS, ", healthCheck: { path: /ok }"), expected);
        assert!(complaint(STABLE_URL, "").contains("v2 has a url and v1 has none"));
        assert!(complaint(STABLE_URL, ", answer: node").contains("v2 has a url and v1 has none"));
        let both = complaint(STABLE_URL, &format!("{STABLE_URL}, answer: node"));
        assert_eq!(both, "r.yaml: spec.stable: found a url and `answer: node`, expected one of them");
    }

    #[test]
    fn classes_say_which_answers_are_errors() {
        let parsed =
            |classes: &str| parse(&GOOD.replace("name: errors,", &format!("name: errors, classes: {classes},")), "r");
        let both = parsed("[5xx, 4xx]").unwrap();
        assert!(both.error_classes.has(404) && both.error_classes.has(503) && !both.error_classes.has(307));
        assert!(parsed("[5xx, 4xx, 3xx]").unwrap().error_classes.has(307));
        assert_eq!(parsed("[5xx]").unwrap(), parse(GOOD, "r").unwrap(), "the default");
        assert_eq!(recorded(&both.value()).unwrap(), both);
        assert!(
            parsed("[4xx]").unwrap_err().to_string().contains("metric errors: classes don't have 5xx, expected it")
        );
        assert!(parsed("[5xx, 2xx]").is_err() && parsed("[]").is_err());
        assert!(
            complaint("name: latency,", "name: latency, classes: [5xx],")
                .contains("classes are for errors by THRESHOLD")
        );
        let metric = "{ name: latency, statistic: p95, thresholdRange: { max: 250 } }";
        let second = "{ name: errors-b, classes: [5xx, 4xx], thresholdRange: { max: 9 } }";
        assert!(complaint(metric, second).contains("metrics have different classes"));
    }

    #[test]
    fn that_nodes_answer_is_said_of_both_versions() {
        let file = |stable: &str, canary: &str| GOOD.replace(STABLE_URL, stable).replace(CANARY_URLS, canary);
        let said = parse(&file(", answer: node", ", answer: node"), "r.yaml").unwrap();
        assert!(said.node_answers && said.stable.urls.is_empty() && said.canary.urls.is_empty());
        assert_eq!(recorded(&said.value()).unwrap(), said, "the log says so too");
        let expected = "r.yaml: v1 and v2 have no url, expected one of both, or `answer: node` in both if nodes are to answer \
                        themselves";
        for (stable, canary) in [("", ""), (", answer: node", ""), ("", ", answer: node")] {
            assert_eq!(parse(&file(stable, canary), "r.yaml").unwrap_err().to_string(), expected);
        }
        assert!(parse(&file(", answer: nobody", ", answer: node"), "r.yaml").is_err());
    }

    #[test]
    fn a_provider_may_have_a_path_prefix() {
        let metric = "{ name: latency, statistic: p95, thresholdRange: { max: 250 } }";
        let at = |address: &str| {
            let provider = format!("provider: {{ prometheus: {{ address: \"{address}\", query: up }} }}");
            GOOD.replace(metric, &format!("{{ name: up, thresholdRange: {{ min: 1 }}, {provider} }}"))
        };
        let spec = parse(&at("http://proxy:80/prometheus/team-a/"), "r.yaml").unwrap();
        assert_eq!(spec.analysis.queries[0].address, "http://proxy:80/prometheus/team-a");
        assert!(parse(&spec.value().to_string(), "log").is_ok(), "the log says so too");
        for wrong in
            ["http://proxy/prometheus", "http://proxy:80/x?tenant=1", "http://u:p@proxy:80/x", "ftp://proxy:80/x"]
        {
            assert!(parse(&at(wrong), "r.yaml").is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_mistake_names_what_was_found_and_expected() {
        let found = complaint("setWeight: 5", "setWieght: 5");
        assert!(found.contains("setWieght") && found.ends_with("did you mean `setWeight`?"), "{found}");
        assert!(found.contains("line 10"), "{found}");
        assert_eq!(
            complaint("{ v1: 80, v2: 20 }", "{ v1: 70, v2: 20 }"),
            "r.yaml: spec.steps: step 5: weights sum to 9000 bp, expected 10000 bp"
        );
        assert_eq!(
            complaint("setWeight: 5", "setWeight: 120"),
            "r.yaml: spec.steps: step 2: weight is 120 %, expected 0 to 100 with at most two decimals"
        );
        assert_eq!(
            complaint("setWeight: 5", "setWeight: 50"),
            "r.yaml: step weight 20% follows 50%, expected weights that never decrease"
        );
        assert!(complaint("duration: 30s", "duration: 30 parsecs").contains("30 parsecs"));
        for months in ["1M", "1y", "2w", "1h 1M", "3weeks", "1yr", "30", "-1s"] {
            let found = complaint("duration: 30s", &format!("duration: {months}"));
            assert!(found.contains(&format!("{months:?}, expected a number and one of ms, s, m, h and d")), "{found}");
        }
        assert!(complaint("setWeight: 5", "setWeight: 5%").contains("expected a number"));
        let two = format!("{GOOD}---{GOOD}");
        assert_eq!(
            parse(&two, "r.yaml").unwrap_err().to_string(),
            "r.yaml: the text holds 2 documents, expected one rollout"
        );
        assert!(complaint("http://127.0.0.1:9101", "https://127.0.0.1:9101").contains("is https, expected http"));
        assert!(
            complaint("strategy: THRESHOLD", "strategy: SEQUENTIAL")
                .contains("thresholdRange and onFailure are THRESHOLD's")
        );
        assert!(
            complaint("strategy: THRESHOLD", "strategy: GUESS").contains("\"GUESS\", expected THRESHOLD or SEQUENTIAL")
        );
        assert!(
            complaint("minSamples: 200", "minSamples: 200\n    alpha: 2")
                .contains("alpha is 2, expected 0.0001 to 0.5")
        );
        assert!(complaint("name: errors, strategy", "name: latency, strategy").contains("two metrics have one name"));
        assert!(complaint("name: latency", "name: cpu").contains("metric \"cpu\" is unknown"));
        assert_eq!(
            complaint("version: v2", "version: v1"),
            "r.yaml: spec.steps: step 5: weights name v2, expected v1 and v1"
        );
        assert!(complaint("kind: Rollout", "kind: Deployment").contains("expected \"Rollout\""));
        let hashed = |keys: &str| complaint("header: X-User-ID", &format!("header: X-User-ID, {keys}"));
        assert!(hashed("salt: rollout, function: xxh64").contains("expected function: xxh3, or no salt"));
        assert!(hashed("saltSlot: 3").contains("found saltSlot, which the cluster writes, without salt: rollout"));
        assert!(hashed("salt: none, saltSlot: 3").contains("found saltSlot"));
        for cookie in ["set: true", "maxAge: 1h"] {
            assert!(hashed(cookie).contains("expected { cookie: NAME, set: true }"), "{cookie}");
        }
        let cookie = |keys: &str| complaint("header: X-User-ID", &format!("cookie: sid, {keys}"));
        assert!(cookie("maxAge: 1h").contains("maxAge for one that is set"));
        assert!(cookie("set: true, maxAge: 10ms").contains("routing.hashOn.maxAge is 10 ms, expected 1000 to"));
        let limited = |keys: &str| complaint("match: [", &format!("timeouts: {{ {keys} }}\n    match: ["));
        assert!(limited("firstByte: 0s").contains("routing.timeouts.firstByte is 0 ms, expected 1 to 86400000 ms"));
        assert!(limited("idle: 2d").contains("routing.timeouts.idle is 172800000 ms"));
        assert!(limited("total: 2d").contains("routing.timeouts.total is 172800000 ms, expected 0 to"));
        assert!(hashed("function: md5").contains("md5") && hashed("salt: service").contains("service"));
        assert!(complaint("{ X-Canary: { exact: always } }", "{}").contains("names no header"));
        assert!(complaint("header: X-User-ID", "header: \"X User\"").contains("expected letters, digits and hyphens"));
        assert!(complaint("http://127.0.0.1:9101", "http://127.0.0.1").contains("expected http://host:port"));
        assert!(complaint("header: X-User-ID", "header: a, cookie: b").contains("expected one of header, cookie"));
        assert!(
            complaint("version: v1,", "version: v1, healthCheck: { path: ok },")
                .contains("expected one such as /healthz")
        );
        assert!(complaint("match: [", "mirror: { percent: 120 }\n    match: [").contains("weight is 120 %"));
        assert!(complaint("lease: 3s", "lease: 100ms").contains("safety.lease is 100 ms, expected 1000 to 60000 ms"));
    }
}
