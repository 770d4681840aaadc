//! Starting and stopping services: by a program, by a request, or by people.

use std::io;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use http::{Request, header};
use http_body_util::Full;
use tracing::info;

use crate::config::router::{HooksConfig, RouterConfig};
use crate::domain::router_state::HookCall;
use crate::domain::side::Side;
use crate::http_client::{HttpClient, HttpError, HttpSettings};
use crate::ports::{Hooks, OutsideError, Topic};

/// Between two looks at a program that runs.
const LOOK: Duration = Duration::from_millis(20);

/// Why a hook did not do what it was called for.
#[derive(Debug, thiserror::Error)]
enum HookError {
    /// The program could not be started or waited for.
    #[error("{program}: {error}")]
    Program { program: String, error: io::Error },
    /// The program ended otherwise than with status 0.
    #[error("{program}: {status}, expected exit status 0")]
    Exit { program: String, status: ExitStatus },
    /// The program was still running and has been killed.
    #[error("{program}: not done within {} s", .timeout.as_secs())]
    Late { program: String, timeout: Duration },
    /// The request could not be prepared.
    #[error("{url}: {error}")]
    Runtime { url: String, error: io::Error },
    /// The request got no answer, or not 2xx.
    #[error("{url}: {error}")]
    Http { url: String, error: HttpError },
}

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
fn run(argv: &[String], words: &[&str], environment: &[(&str, &str)], timeout: Duration) -> Result<(), HookError> {
    let (program, first) = argv.split_first().expect("checked when the file was read");
    let mut command = Command::new(program);
    command.args(first).args(words).envs(environment.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null());
    let failed = |error| HookError::Program { program: program.clone(), error };
    let mut child = command.spawn().map_err(failed)?;
    let mut left = timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(HookError::Exit { program: program.clone(), status }),
            Ok(None) if left.is_zero() => {
                // It would go on while it is called again.
                let _ = child.kill().and_then(|()| child.wait());
                return Err(HookError::Late { program: program.clone(), timeout });
            }
            Ok(None) => {
                std::thread::sleep(LOOK);
                left = left.saturating_sub(LOOK);
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

fn post(url: &str, body: String, timeout: Duration) -> Result<(), HookError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| HookError::Runtime { url: url.into(), error })?;
    let posted = runtime.block_on(async {
        let request = Request::post(url).header(header::CONTENT_TYPE, "application/json").body(Full::from(body))?;
        // The body of the answer says nothing that matters.
        HttpClient::new(HttpSettings::new(timeout)).open(request, timeout).await?.expect_success()
    });
    posted.map(drop).map_err(|error| HookError::Http { url: url.into(), error })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn sh(script: &str, timeout_ms: u64) -> Result<(), String> {
        let argv = ["sh", "-c", script, "hook"].map(String::from);
        let words = ["stop", "stable", "orders", "group"];
        let done = run(&argv, &words, &[("AVIARY_VERSION", "v1")], Duration::from_millis(timeout_ms));
        done.map_err(|error| error.to_string())
    }

    #[test]
    fn a_program_is_told_what_to_do_and_its_failure_is_said() {
        assert_eq!(sh("[ \"$1 $2 $3 $4 $AVIARY_VERSION\" = 'stop stable orders group v1' ]", 5_000), Ok(()));
        assert_eq!(sh("exit 3", 5_000), Err("sh: exit status: 3, expected exit status 0".into()));
        assert!(sh("sleep 60", 100).unwrap_err().contains("not done within"));
        let missing = run(&["/no/program".into()], &[], &[], Duration::ZERO).unwrap_err();
        assert_eq!(missing.to_string(), "/no/program: No such file or directory (os error 2)");
    }

    #[test]
    fn a_request_that_is_not_answered_2xx_in_time_says_so() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let mut asked = String::new();
            for answer in ["HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 409 Conflict\r\ncontent-length: 0\r\n\r\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let length = stream.read(&mut request).unwrap();
                asked = String::from_utf8_lossy(&request[..length]).into_owned();
                stream.write_all(answer.as_bytes()).unwrap();
            }
            (listener, asked)
        });
        let call = |timeout_ms| post(&url, "{}".into(), Duration::from_millis(timeout_ms)).map_err(|e| e.to_string());
        assert_eq!(call(5_000), Ok(()));
        assert_eq!(call(5_000), Err(format!("{url}: 409 Conflict, expected 2xx")));
        let (_silent, asked) = server.join().unwrap();
        assert!(asked.starts_with("POST /hook HTTP/1.1\r\ncontent-type: application/json\r\n"), "{asked}");
        assert_eq!(call(100), Err(format!("{url}: no answer within 100 ms")));
    }
}
