//! `aviary cluster upgrade --check` and `downgrade --check`: may the nodes be replaced one by one, and what stands in the way.

use std::collections::BTreeSet;

use clap::Args;
use serde::Serialize;

use super::output::{self, Format};
use super::{Exit, read};
use crate::client::Api;
use crate::domain::ids::{NodeId, ServiceId};
use crate::model::{ClusterView, FeatureView};
use crate::protocol::Mode;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary cluster upgrade --check && systemctl restart aviary\n\n\
    Exit code: 0 if it may begin, 1 if something stands in the way. Check again before each node.")]
pub struct UpgradeArgs {
    /// Say whether a rolling upgrade may begin; nothing is changed.
    #[arg(long, required = true)]
    check: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  aviary cluster downgrade --check\n\n\
    Exit code: 0 if it may begin, 1 if something stands in the way. Check again before each node.")]
pub struct DowngradeArgs {
    /// Say whether the nodes may go back to the version before, one by one; nothing is changed.
    #[arg(long, required = true)]
    check: bool,
}

/// Slots that a member's last word may lag behind while the cluster decides: it tells them four times a second.
const LAG_SLOTS_MAX: u64 = 64;
/// With fewer voters, the one that restarts takes the majority with it.
const VOTERS_MIN: usize = 3;

/// Where the nodes are to go, one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the next version.
    Upgrade,
    /// To the version before.
    Downgrade,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Upgrade => "upgrade",
            Self::Downgrade => "downgrade",
        }
    }
}

/// One thing that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Obstacle {
    what: String,
    /// What to type or to do.
    cure: String,
}

/// The answer of the check.
#[derive(Debug, Serialize)]
struct Readiness {
    may_begin: bool,
    obstacles: Vec<Obstacle>,
    /// Features that wait for members that don't know them yet.
    waiting: Vec<FeatureView>,
}

/// Asks a node for its cluster, and prints whether the nodes may be replaced one by one.
pub async fn run(api: &Api, direction: Direction, format: Format) -> anyhow::Result<Exit> {
    let answer = api.get("/v1/cluster").await?;
    if !answer.status.is_success() {
        return read::print(&answer, format, serde_json::Value::to_string);
    }
    let cluster: ClusterView = serde_json::from_str(&answer.body)?;
    let obstacles = obstacles(&cluster, direction);
    let exit = if obstacles.is_empty() { Exit::Done } else { Exit::Refused };
    let waiting = cluster.features.iter().filter(|feature| !feature.waits_for.is_empty()).cloned().collect();
    let answer = Readiness { may_begin: obstacles.is_empty(), obstacles, waiting };
    output::print(format, &serde_json::to_string(&answer)?, |_| text(&cluster, &answer, direction))?;
    Ok(exit)
}

fn text(cluster: &ClusterView, answer: &Readiness, direction: Direction) -> String {
    let name = direction.name();
    let features: String = answer.waiting.iter().map(|feature| format!("\n{}", waits(feature))).collect();
    if answer.may_begin {
        let count = cluster.members.len();
        return format!(
            "a rolling {name} may begin: all {count} voters are alive and caught up, and nothing is open or in doubt{features}"
        );
    }
    let lines = answer.obstacles.iter().map(|Obstacle { what, cure }| format!("  {what}\n    {cure}"));
    format!("a rolling {name} may not begin:\n{}{features}", lines.collect::<Vec<_>>().join("\n"))
}

/// Returns which members a feature waits for, in a line.
pub fn waits(feature: &FeatureView) -> String {
    let told = |(node, build): (&NodeId, &Option<String>)| {
        format!("node {node} ({})", build.as_deref().unwrap_or("its build is not known"))
    };
    let nodes: Vec<_> = feature.waits_for.iter().map(told).collect();
    format!("feature {} (aviary {}) waits for {}", feature.name, feature.release, nodes.join(", "))
}

fn obstacles(cluster: &ClusterView, direction: Direction) -> Vec<Obstacle> {
    let mut found = Vec::new();
    let mut add = |what: String, cure: String| found.push(Obstacle { what, cure });
    let again = || format!("wait, then repeat: aviary cluster {} --check", direction.name());
    let voters = cluster.members.len();
    if voters < VOTERS_MIN {
        let cure = "aviary cluster join, then aviary cluster add NODE --incarnation HEX".into();
        add(
            format!("found {voters} voters, expected at least {VOTERS_MIN}: one that restarts takes the majority away"),
            cure,
        );
    }
    if cluster.membership != "Voter" || cluster.mode == Mode::Learner {
        let cure = format!("aviary cluster status, then aviary cluster readmit {} --incarnation HEX", cluster.node);
        add(format!("node {} is a learner: it has no vote", cluster.node), cure);
    } else if cluster.mode != Mode::Normal {
        add(format!("node {} hears from no majority", cluster.node), "aviary cluster status".into());
    }
    if direction == Direction::Downgrade {
        used(cluster).into_iter().for_each(|Obstacle { what, cure }| add(what, cure));
    }
    let newest = cluster.members.values().filter_map(|member| member.head).chain([cluster.head]).max();
    for (node, member) in &cluster.members {
        if !member.alive {
            add(format!("node {node} is not alive"), format!("start node {node}, or: aviary cluster remove {node}"));
            continue;
        }
        if let Some(why) = &member.counts_not {
            let cure = format!("aviary cluster readmit {node} --incarnation {}", member.incarnation);
            add(format!("the votes of node {node} don't count: {why}"), cure);
        }
        let lag = newest.map_or(0, |newest| newest.0) - member.head.map_or(0, |head| head.0);
        if lag > LAG_SLOTS_MAX {
            add(format!("node {node} is {lag} slots behind"), again());
        }
        if member.protocol.is_none() {
            add(format!("node {node} has not told its build and protocol versions"), "aviary cluster status".into());
        }
    }
    if let Some((what, cure)) = mixed(cluster, direction) {
        add(what, cure);
    }
    if let Some(slot) = cluster.open {
        add(format!("slot {slot} is open: a transaction is under way"), again());
    }
    for service in &cluster.in_doubt {
        add(format!("service {service}: a decision is not settled"), format!("aviary status {service}"));
    }
    found
}

/// Returns what keeps the nodes from going back: the log made use of what the version before can't read, or a rollout under way
/// of what that version gives no traffic to.
fn used(cluster: &ClusterView) -> Vec<Obstacle> {
    let obstacle = |feature: &FeatureView| {
        let FeatureView { name, release, used_by, .. } = feature;
        if used_by.is_empty() {
            let what = format!("feature {name} was used: versions before aviary {release} can't read the log");
            let cure =
                "stay, or restore a backup from before into a new cluster of that version: aviary cluster restore";
            return vec![Obstacle { what, cure: cure.into() }];
        }
        let of = |service: &ServiceId| Obstacle {
            what: format!(
                "the rollout of {service} uses feature {name}: versions before aviary {release} refuse to vote for it, and \
                 give its canary no traffic"
            ),
            cure: format!("aviary watch {service} until it ends, or: aviary abort {service}"),
        };
        used_by.iter().map(of).collect()
    };
    cluster.features.iter().filter(|feature| feature.used).flat_map(obstacle).collect()
}

/// Returns what is wrong if nodes speak different protocol versions: an upgrade is under way, and the next version would meet
/// the one before the last. On the way down that is how it goes, but for a node that is two versions behind. Nodes that are no
/// members follow the log too, so that they are counted.
fn mixed(cluster: &ClusterView, direction: Direction) -> Option<(String, String)> {
    let members = cluster.members.iter().map(|(node, member)| (node, &member.build, member.protocol));
    let outsiders = cluster.outsiders.iter().filter(|(_, outsider)| outsider.alive);
    let outsiders = outsiders.map(|(node, outsider)| (node, &outsider.build, outsider.protocol));
    let spoken: Vec<_> =
        members.chain(outsiders).filter_map(|(node, build, protocol)| Some((node, build, protocol?))).collect();
    let newest = spoken.iter().map(|(.., versions)| versions.max).max()?;
    let allowed = if direction == Direction::Downgrade { 1 } else { 0 };
    let behind: Vec<_> = spoken.iter().filter(|(.., versions)| versions.max + allowed < newest).collect();
    let (node, build, versions) = behind.first()?;
    let build = build.as_deref().unwrap_or("an unknown build");
    let what =
        format!("node {node} ({build}) speaks protocol {versions}, others speak {newest}: an upgrade is under way");
    let names: Vec<_> = behind.iter().map(|(node, ..)| node.as_str()).collect();
    Some((what, format!("upgrade node {} to the others' build first", names.join(", "))))
}

/// Returns a line that tells which nodes run which build, the oldest first; none where all run the same.
pub fn builds_differ(members: &[(String, String)]) -> Option<String> {
    let builds: BTreeSet<_> = members.iter().map(|(_, build)| build).filter(|build| !build.is_empty()).collect();
    if builds.len() < 2 {
        return None;
    }
    let mut builds: Vec<_> = builds.into_iter().collect();
    builds.sort_by_key(|build| age(build));
    let of = |wanted: &String| {
        let nodes: Vec<_> =
            members.iter().filter(|(_, build)| build == wanted).map(|(node, _)| node.as_str()).collect();
        format!("{wanted} on {}", nodes.join(", "))
    };
    let (first, last) = (builds[0], builds[builds.len() - 1]);
    let all: Vec<_> = builds.iter().map(|build| of(build)).collect();
    Some(match age(first) < age(last) {
        true => format!("builds differ, the oldest first: {}", all.join("; ")),
        false => format!("builds of the same version differ: {}", all.join("; ")),
    })
}

/// Returns the numbers of a build's version and of the commits since its tag: `0.2.0 (v0.2.0-3-gabc)` is [0, 2, 0, 3].
fn age(build: &str) -> Vec<u64> {
    let (version, commit) = build.split_once(" (").unwrap_or((build, ""));
    let since_tag = commit.rsplit('-').nth(1).and_then(|count| count.parse().ok()).unwrap_or(0);
    version.split('.').map(|part| part.parse().unwrap_or(0)).chain([since_tag]).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn cluster(change: impl FnOnce(&mut Value)) -> Vec<String> {
        checked(Direction::Upgrade, change)
    }

    fn checked(direction: Direction, change: impl FnOnce(&mut Value)) -> Vec<String> {
        let member = json!({
            "alive": true, "head": 900, "incarnation": "00aa", "cordoned": false, "counts_not": null,
            "build": "0.2.0 (v0.2.0)", "protocol": {"min": 8, "max": 9}, "formats": {},
        });
        let mut json = json!({
            "cluster": "00", "node": "a", "incarnation": "00aa", "coordinator": "a", "hash": "00", "open": null,
            "membership": "Voter", "mode": "normal", "head": 910, "in_doubt": [], "outsiders": {},
            "features": [{"name": "x", "protocol": 9, "release": "0.3.0", "used": false, "waits_for": {}}],
            "members": {"a": member, "b": member, "c": member},
        });
        change(&mut json);
        let found = obstacles(&serde_json::from_value(json).unwrap(), direction);
        found.into_iter().map(|Obstacle { what, cure }| format!("{what} => {cure}")).collect()
    }

    #[test]
    fn a_whole_cluster_may_be_upgraded() {
        assert_eq!(cluster(|_| {}), Vec::<String>::new());
    }

    #[test]
    fn each_obstacle_is_named_with_what_to_do() {
        let one = |change: fn(&mut Value)| cluster(change).join("; ");
        let dead = one(|json| json["members"]["c"]["alive"] = false.into());
        assert_eq!(dead, "node c is not alive => start node c, or: aviary cluster remove c");
        let lost = one(|json| json["members"]["b"]["counts_not"] = "its disk was replaced".into());
        assert!(lost.contains("its disk was replaced => aviary cluster readmit b --incarnation 00aa"), "{lost}");
        let behind = one(|json| json["head"] = 2_000.into());
        assert_eq!(behind.matches("is 1100 slots behind").count(), 3, "{behind}");
        let learner = one(|json| json["membership"] = "Learner".into());
        assert!(learner.contains("node a is a learner"), "{learner}");
        let alone = one(|json| json["mode"] = "fail_safe".into());
        assert!(alone.contains("hears from no majority"), "{alone}");
        let silent = one(|json| json["members"]["b"]["protocol"] = Value::Null);
        assert!(silent.contains("node b has not told its build"), "{silent}");
        let mixed = one(|json| json["members"]["b"]["protocol"] = json!({"min": 8, "max": 8}));
        assert!(mixed.contains("node b (0.2.0 (v0.2.0)) speaks protocol 8, others speak 9"), "{mixed}");
        let doubt = one(|json| json["in_doubt"] = json!(["s"]));
        assert_eq!(doubt, "service s: a decision is not settled => aviary status s");
        let two = one(|json| drop(json["members"].as_object_mut().unwrap().remove("c")));
        assert!(two.contains("found 2 voters, expected at least 3"), "{two}");
    }

    #[test]
    fn what_is_open_and_who_follows_without_a_vote_is_looked_at_too() {
        let open = cluster(|json| json["open"] = 911.into()).join("; ");
        let again = "wait, then repeat: aviary cluster upgrade --check";
        assert_eq!(open, format!("slot 911 is open: a transaction is under way => {again}"));
        let outsider = |max: u16, alive: bool| {
            let protocol = json!({"min": max - 1, "max": max});
            json!({"alive": alive, "head": 3, "incarnation": "00dd", "build": "0.1.9 (x)", "protocol": protocol})
        };
        let old = cluster(|json| json["outsiders"]["d"] = outsider(8, true)).join("; ");
        assert!(old.starts_with("node d (0.1.9 (x)) speaks protocol 7 to 8, others speak 9"), "{old}");
        assert_eq!(cluster(|json| json["outsiders"]["d"] = outsider(8, false)), Vec::<String>::new());
        assert_eq!(cluster(|json| json["outsiders"]["d"] = outsider(9, true)), Vec::<String>::new());
    }

    #[test]
    fn nodes_go_back_until_a_feature_was_used() {
        let down = |change: fn(&mut Value)| checked(Direction::Downgrade, change).join("; ");
        assert_eq!(down(|_| {}), "");
        assert_eq!(down(|json| json["members"]["b"]["protocol"] = json!({"min": 7, "max": 8})), "", "on the way");
        let older = down(|json| json["members"]["b"]["protocol"] = json!({"min": 6, "max": 7}));
        assert!(older.contains("node b (0.2.0 (v0.2.0)) speaks protocol 6 to 7"), "{older}");
        let used = down(|json| json["features"][0]["used"] = true.into());
        let cure = "stay, or restore a backup from before into a new cluster of that version: aviary cluster restore";
        assert_eq!(used, format!("feature x was used: versions before aviary 0.3.0 can't read the log => {cure}"));
        assert_eq!(cluster(|json| json["features"][0]["used"] = true.into()), Vec::<String>::new());
        let by_rollouts = down(|json| {
            json["features"][0]["used"] = true.into();
            json["features"][0]["used_by"] = json!(["fraud", "shop"]);
        });
        let of = |service: &str| {
            format!(
                "the rollout of {service} uses feature x: versions before aviary 0.3.0 refuse to vote for it, and give its \
                 canary no traffic => aviary watch {service} until it ends, or: aviary abort {service}"
            )
        };
        assert_eq!(by_rollouts, [of("fraud"), of("shop")].join("; "));
    }

    #[test]
    fn the_older_build_is_named_first() {
        let line = |builds: [&str; 3]| {
            let members: Vec<_> = ["a", "b", "c"].into_iter().map(String::from).zip(builds.map(String::from)).collect();
            builds_differ(&members)
        };
        assert_eq!(line(["0.2.0 (x)", "0.2.0 (x)", ""]), None);
        assert_eq!(
            line(["0.10.0 (x)", "0.9.0 (y)", "0.10.0 (x)"]).unwrap(),
            "builds differ, the oldest first: 0.9.0 (y) on b; 0.10.0 (x) on a, c"
        );
        let ahead = line(["0.2.0 (v0.2.0-12-gabc)", "0.2.0 (v0.2.0-3-gdef)", ""]).unwrap();
        assert!(ahead.contains("first: 0.2.0 (v0.2.0-3-gdef) on b;"), "{ahead}");
        assert!(line(["0.2.0 (abc)", "0.2.0 (def)", ""]).unwrap().starts_with("builds of the same version differ"));
    }
}
