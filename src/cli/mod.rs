//! The command line: one file per verb or small group of verbs; this file is the list of them.
//!
//! Verbs that talk to a cluster do it over HTTP like any other client (see `client`) and know no more than the API
//! says: they read its JSON leniently, so that an older `aviary` still works with a newer node.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

mod access_log;
mod announced;
mod backup;
mod check;
mod cluster;
mod diff;
mod events;
mod followed;
mod input;
mod judge;
mod load;
mod log_file;
pub mod node;
mod output;
mod plan;
mod proxy;
mod read;
mod recording;
mod replay;
#[cfg(feature = "kafka")]
mod router;
mod schema;
mod service;
mod show;
mod status;
mod stop;
mod telemetry;
mod token;
mod upgrade;
mod upstream;
mod version;
mod watch;
mod write;

use crate::client::{Address, Api, Unreachable};
use crate::ports::OutsideError;
use crate::router::snapshot::LookError;
use output::Format;

/// Exit code of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0: done, or the rollout completed.
    Done,
    /// 1: the cluster refused, aborted or rolled back, or a file has an error.
    Refused,
    /// 2: timeout, no quorum, or no node answered; a retry may succeed.
    Unavailable,
    /// 3: the rollout waits for a person.
    Waits,
    /// 4: another rollout of the service took the place of the one that was waited for.
    Replaced,
    /// 64: the command line has an error.
    Usage,
}

impl Exit {
    fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Refused => 1,
            Self::Unavailable => 2,
            Self::Waits => 3,
            Self::Replaced => 4,
            Self::Usage => 64,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

const EXAMPLES: &str = "\
Examples:
  aviary apply -f config/rollout.yaml --wait     start a rollout and follow it to its end
  aviary watch fraud-model                       show the same on a live screen
  aviary abort fraud-model --reason 'odd scores' send all traffic to stable, without a health vote
  aviary get fraud-model --all-nodes             compare the routing of all nodes
  aviary get fraud-model --field phase           print one field, for scripts
  aviary cluster cordon c                         let rollouts go on while node c is repaired
  aviary upstream --listen 127.0.0.1:9101 --version v1
  aviary load --url http://127.0.0.1:8081/predict --rate 200 --duration 30s

Exit codes:
  0   done, or the rollout completed
  1   refused, aborted or rolled back; the nodes differ; or a file has an error
  2   timeout, no quorum, or no node could be reached: you can retry
  3   the rollout waits for a person: it is paused, or at a step without a duration (--success-on-pause: 0)
  4   another rollout took the place of the one that was waited for
  64  the command line has an error

Environment:
  AVIARY_API    addresses of the nodes' API ports, separated by commas
  AVIARY_TOKEN  bearer token; an API that listens off loopback needs one (or --token-file)
  NO_COLOR      if it is set, output has no colours";

/// Weighted canary rollouts whose nodes agree, by a vote, on how much traffic the canary gets.
#[derive(Debug, Parser)]
#[command(name = "aviary", version, about, after_help = EXAMPLES, arg_required_else_help = true)]
#[command(propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Options that every verb takes: output format, color, addresses, token.
#[derive(Debug, Args)]
#[command(next_help_heading = "Everywhere")]
struct Global {
    /// Addresses of the nodes' API ports; if a node can't be reached, the next one is tried.
    #[arg(long, env = "AVIARY_API", global = true, value_delimiter = ',', value_name = "URL[,URL…]")]
    #[arg(default_value = "http://127.0.0.1:50051,http://127.0.0.1:50052,http://127.0.0.1:50053")]
    api: Vec<Address>,
    /// File with the bearer token; default: the variable AVIARY_TOKEN. Arguments are visible to all users, so none takes a token.
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Format of the output; `json` prints the node's answer unchanged. `get -o yaml` prints the rollout file.
    #[arg(short = 'o', long = "output", global = true, default_value = "table", value_name = "FORMAT")]
    output: Format,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run one node until SIGINT or SIGTERM; at SIGHUP it reads its tokens and certificates again and reopens its log file.
    Node(node::NodeArgs),
    /// Create a cluster, show its members, and change which nodes vote.
    #[command(subcommand)]
    Cluster(cluster::ClusterVerb),
    /// Say which service gets the requests that name none.
    #[command(subcommand)]
    Service(service::ServiceVerb),
    /// Start a rollout from a file.
    Apply(write::ApplyArgs),
    /// Tell what applying a rollout file would do.
    Diff(diff::DiffArgs),
    /// List the rollouts of all services.
    List(read::ListArgs),
    /// Show the rollout of one service.
    Get(read::GetArgs),
    /// Wait until a rollout ends or waits for a person.
    Status(status::StatusArgs),
    /// Promote the canary to the next step, or to 100 %.
    Promote(write::PromoteArgs),
    /// Hold the canary's weight until `resume`.
    Pause(write::ReasonArgs),
    /// Continue a rollout that was paused.
    Resume(write::NameArgs),
    /// Send all traffic to stable. Needs a majority of nodes, but no health vote; it is let in however many others ask.
    Abort(write::ReasonArgs),
    /// Start a rolled-back rollout again.
    Retry(write::NameArgs),
    /// Start a rollout back to the former version; a rollout in progress is aborted.
    Undo(write::UndoArgs),
    /// Show the recorded decisions about a service, with their reasons.
    History(read::HistoryArgs),
    /// Show a rollout on a live screen.
    Watch(watch::WatchArgs),
    /// Print the cluster's events, one per line.
    Events(events::EventsArgs),
    /// Check configuration files without a cluster.
    #[command(subcommand)]
    Config(check::ConfigVerb),
    /// Run the data plane alone, with a fixed canary weight.
    Proxy(proxy::ProxyArgs),
    /// Analyse requests from standard input and print a verdict for each tick.
    Judge(judge::JudgeArgs),
    /// Estimate which regressions a rollout's analysis can detect, and how fast.
    Plan(plan::PlanArgs),
    /// Analyse a recording again and print each decision with its reason.
    Replay(replay::ReplayArgs),
    /// Split a Kafka topic between the stable and the canary service; each record goes to exactly one.
    #[cfg(feature = "kafka")]
    #[command(subcommand)]
    Router(router::RouterVerb),
    /// Run a demo model server whose latency and error rate can be set.
    Upstream(upstream::UpstreamArgs),
    /// Report synthetic telemetry events of a service.
    #[command(subcommand)]
    Telemetry(telemetry::TelemetryVerb),
    /// Send requests at a constant rate and count the answers by version.
    Load(load::LoadArgs),
    /// Create a bearer token for the API, and its line for `[api] tokens_file`.
    Token(token::TokenArgs),
    /// Print schemas, for generators of clients.
    #[command(subcommand)]
    Schema(schema::SchemaVerb),
    /// Print the version, the commit, the compiler, and the formats of disk and wire.
    Version,
    /// Print a shell's completion script.
    Completions {
        /// Shell that the script is for.
        shell: clap_complete::Shell,
    },
}

/// Runs the program with the arguments of the process; returns its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Done.into() };
        }
    };
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(error) if is_broken_pipe(&error) => Exit::Done.into(),
        Err(error) => {
            output::error(&format!("{error:#}"));
            failed(&error).into()
        }
    }
}

/// Returns how the program ends with an error: whether another try may succeed.
fn failed(error: &anyhow::Error) -> Exit {
    let outside = match error.downcast_ref::<LookError>() {
        Some(LookError::Outside(outside)) => Some(outside),
        Some(LookError::Gone | LookError::Metadata { .. }) => None,
        None => error.downcast_ref::<OutsideError>(),
    };
    let unavailable = outside.is_some_and(|outside| !outside.replaced && !outside.lasting) || error.is::<Unreachable>();
    if unavailable { Exit::Unavailable } else { Exit::Refused }
}

fn run(cli: Cli) -> anyhow::Result<Exit> {
    match cli.verb {
        Verb::Node(args) => node::run(args).map(|()| Exit::Done),
        Verb::Cluster(cluster::ClusterVerb::Init(args)) => cluster::init(args).map(|()| Exit::Done),
        Verb::Cluster(cluster::ClusterVerb::ForceNew(args)) => cluster::force_new(args).map(|()| Exit::Done),
        Verb::Cluster(cluster::ClusterVerb::VerifyBackup(args)) => backup::verify(&args, cli.global.output),
        Verb::Cluster(cluster::ClusterVerb::Restore(args)) => backup::restore(&args),
        Verb::Cluster(cluster::ClusterVerb::Join(args)) => cluster::join(&args).map(|()| Exit::Done),
        Verb::Cluster(cluster::ClusterVerb::Issue(args)) => cluster::issue(&args).map(|()| Exit::Done),
        Verb::Config(verb) => check::run(&verb),
        Verb::Token(args) => Ok(token::run(&args)),
        Verb::Version => version::run(cli.global.output),
        Verb::Schema(verb) => schema::run(&verb),
        Verb::Proxy(args) => proxy::run(&args),
        Verb::Judge(args) => judge::run(&args),
        Verb::Replay(args) => replay::run(&args),
        #[cfg(feature = "kafka")]
        Verb::Router(verb) => router::run(verb, cli.global.output),
        Verb::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "aviary", &mut std::io::stdout());
            Ok(Exit::Done)
        }
        verb => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(run_client(verb, &cli.global))
        }
    }
}

async fn run_client(verb: Verb, global: &Global) -> anyhow::Result<Exit> {
    let format = global.output;
    let api = || Api::new(global.api.clone(), global.token_file.as_deref());
    match verb {
        Verb::Cluster(verb) => cluster::run(&api()?, verb, format).await,
        Verb::Service(verb) => service::run(&api()?, verb, format).await,
        Verb::Apply(args) => write::apply(&api()?, args, format).await,
        Verb::Diff(args) => diff::run(&api()?, &args, format).await,
        Verb::List(args) => read::list(&api()?, &args, format).await,
        Verb::Get(args) => read::get(&api()?, &args, format).await,
        Verb::Status(args) => status::run(&api()?, &args, format).await,
        Verb::Promote(args) => write::promote(&api()?, args, format).await,
        Verb::Pause(args) => write::with_reason(&api()?, "pause", args, format).await,
        Verb::Resume(args) => write::with_name(&api()?, "resume", args, format).await,
        Verb::Abort(args) => write::with_reason(&api()?, "abort", args, format).await,
        Verb::Retry(args) => write::with_name(&api()?, "retry", args, format).await,
        Verb::Undo(args) => write::undo(&api()?, args, format).await,
        Verb::History(args) => read::history(&api()?, &args, format).await,
        Verb::Watch(args) => watch::run(&api()?, &args).await,
        Verb::Events(args) => events::run(&api()?, &args, format).await,
        Verb::Plan(args) => plan::run(api, &args, format).await,
        Verb::Upstream(args) => upstream::run(args).await,
        Verb::Telemetry(verb) => telemetry::run(&api()?, verb).await,
        Verb::Load(args) => load::run(args, format).await,
        Verb::Node(_)
        | Verb::Config(_)
        | Verb::Token(_)
        | Verb::Version
        | Verb::Schema(_)
        | Verb::Proxy(_)
        | Verb::Judge(_)
        | Verb::Replay(_)
        | Verb::Completions { .. } => {
            unreachable!("handled before the runtime starts")
        }
        #[cfg(feature = "kafka")]
        Verb::Router(_) => unreachable!("handled before the runtime starts"),
    }
}

/// A reader that went away (`aviary events | head -1`) is no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Milliseconds since 1970, for lines that people read.
#[expect(clippy::disallowed_methods, reason = "the command line is the edge, and shows times to people only")]
fn wall_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |t| t.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn addresses_come_with_commas_and_verbs_take_the_global_options_after_them() {
        let line = ["aviary", "get", "m", "--api", "http://127.0.0.1:1,127.0.0.1:2", "-o", "json"];
        let cli = Cli::try_parse_from(line).unwrap();
        let found: Vec<_> = cli.global.api.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["http://127.0.0.1:1", "http://127.0.0.1:2"]);
        assert_eq!(cli.global.output, Format::Json);
    }

    #[test]
    fn only_what_another_try_may_mend_ends_with_2() {
        let outside = || OutsideError::new("kafka topic orders", "timed out");
        let why = crate::domain::split::Split::from_metadata("nonsense").unwrap_err();
        for (error, exit) in [
            (outside().into(), Exit::Unavailable),
            (LookError::Outside(outside()).into(), Exit::Unavailable),
            (OutsideError::replaced("kafka", "fenced").into(), Exit::Refused),
            (OutsideError::lasting("kafka", "another rollout").into(), Exit::Refused),
            (LookError::Metadata { partition: 1, why }.into(), Exit::Refused),
            (LookError::Gone.into(), Exit::Refused),
            (Unreachable { failed: Vec::new() }.into(), Exit::Unavailable),
            (anyhow::anyhow!("nonsense"), Exit::Refused),
        ] {
            assert_eq!(failed(&error), exit, "{error:#}");
        }
    }

    #[test]
    fn a_token_is_never_an_argument() {
        assert!(Cli::try_parse_from(["aviary", "list", "--token", "secret"]).is_err());
    }
}
