//! Starting and stopping services: by a program, by a request, or by people.

use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tracing::info;

use crate::config::router::{HooksConfig, RouterConfig};
use crate::domain::course::HookCall;
use crate::domain::side::Side;
use crate::ports::{Hooks, OutsideError, Topic};

/// Between two looks at a program that runs.
const LOOK: Duration = Duration::from_millis(20);

/// The hooks of a router's file.
pub struct ServiceHooks {
    config: RouterConfig,
}

impl ServiceHooks {
    /// Returns the hooks that the file names.
    pub fn new(config: &RouterConfig) -> Self {
        Self { config: config.clone() }
    }
}

impl Hooks for ServiceHooks {
    fn call(&mut self, call: HookCall, side: Side, topic: Topic, number: u64) -> Result<(), OutsideError> {
        let (call_number, number) = (number, number.to_string());
        let service = self.config.service(side);
        let topic = match topic {
            Topic::Source => &self.config.source,
            Topic::Of(side) => &self.config.service(side).topic,
        };
        let what = format!("hook {} {} {topic} {}", call.word(), side.word(), service.group);
        let done = match &self.config.hooks {
            HooksConfig::Manual => {
                let (call, side, group) = (call.word(), side.word(), &service.group);
                info!("{call} the {side} service by hand, with topic {topic} and group {group}, read_committed");
                Ok(())
            }
            HooksConfig::Exec { argv, timeout_ms } => {
                let words = [call.word(), side.word(), topic.as_str(), service.group.as_str()];
                let environment = [
                    ("AVIARY_ROUTER", self.config.name.as_str()),
                    ("AVIARY_VERSION", service.version.as_str()),
                    ("AVIARY_CALL", number.as_str()),
                    ("KAFKA_BOOTSTRAP", self.config.kafka.bootstrap.as_str()),
                ];
                run(argv, &words, &environment, Duration::from_millis(*timeout_ms))
            }
            HooksConfig::Http { url, timeout_ms } => {
                let body = serde_json::json!({
                    "call": call.word(), "side": side.word(), "topic": topic, "group": service.group,
                    "version": service.version, "router": self.config.name, "number": call_number,
                });
                post(url, body.to_string(), Duration::from_millis(*timeout_ms))
            }
        };
        done.map_err(|why| OutsideError::new(what, why))
    }
}

#[expect(clippy::disallowed_methods, reason = "a router has a thread of its own")]
fn run(argv: &[String], words: &[&str], environment: &[(&str, &str)], timeout: Duration) -> Result<(), String> {
    let (program, first) = argv.split_first().expect("checked when the file was read");
    let mut command = Command::new(program);
    command.args(first).args(words).envs(environment.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().map_err(|why| format!("{program}: {why}"))?;
    let mut left = timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("{program}: {status}, expected exit status 0")),
            Ok(None) if left.is_zero() => {
                // It would go on while it is called again.
                let _ = child.kill().and_then(|()| child.wait());
                return Err(format!("{program}: not done within {} s", timeout.as_secs()));
            }
            Ok(None) => {
                std::thread::sleep(LOOK);
                left = left.saturating_sub(LOOK);
            }
            Err(why) => return Err(format!("{program}: {why}")),
        }
    }
}

fn post(url: &str, body: String, timeout: Duration) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|why| why.to_string())?;
    let request =
        Request::post(url).header(header::CONTENT_TYPE, "application/json").body(Full::from(Bytes::from(body)));
    let request = request.map_err(|why| why.to_string())?;
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let answer = runtime.block_on(async { tokio::time::timeout(timeout, client.request(request)).await });
    match answer {
        Err(_) => Err(format!("{url}: no answer within {} s", timeout.as_secs())),
        Ok(Err(why)) => Err(format!("{url}: {why}")),
        Ok(Ok(answer)) if answer.status().is_success() => Ok(()),
        Ok(Ok(answer)) => Err(format!("{url}: {}, expected 2xx", answer.status())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, timeout_ms: u64) -> Result<(), String> {
        let argv = ["sh", "-c", script, "hook"].map(String::from);
        run(
            &argv,
            &["stop", "stable", "orders", "group"],
            &[("AVIARY_VERSION", "v1")],
            Duration::from_millis(timeout_ms),
        )
    }

    #[test]
    fn a_program_is_told_what_to_do_and_its_failure_is_said() {
        assert_eq!(sh("[ \"$1 $2 $3 $4 $AVIARY_VERSION\" = 'stop stable orders group v1' ]", 5_000), Ok(()));
        assert_eq!(sh("exit 3", 5_000), Err("sh: exit status: 3, expected exit status 0".into()));
        assert!(sh("sleep 60", 100).unwrap_err().contains("not done within"));
        assert!(run(&["/no/program".into()], &[], &[], Duration::ZERO).unwrap_err().starts_with("/no/program: "));
    }
}
