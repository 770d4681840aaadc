//! Founding a cluster: its id, its members' identities, and the first record of every log.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, RngExt};

use crate::domain::ids::{ClusterId, Incarnation, NodeId, TxId};
use crate::domain::time::Wall;
use crate::protocol::record::{
    AcceptorState, Chosen, Hash, Initiator, Intent, Member, Members, Operation, Record, Slot,
};

use super::node::NodeConfig;

/// A cluster that has not run yet.
#[derive(Debug, Clone)]
pub struct Founding {
    /// Random id of the cluster.
    pub cluster: ClusterId,
    /// The first record, the same on every node.
    pub genesis: Chosen,
    /// First acceptor state of each node, without promises.
    pub acceptors: BTreeMap<NodeId, AcceptorState>,
}

/// Why files don't make a cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FoundError {
    /// Two files name one node.
    #[error("{0} names node {1}, which another file names too; expected one file for each node")]
    Twice(String, NodeId),
    /// Two files name one data directory.
    #[error("{0} names data_dir {1}, which another file names too; expected one for each node")]
    SharedDirectory(String, String),
    /// A file's peers aren't the other nodes.
    #[error("{file}: peers are {found}, expected {expected}: the other nodes given to this command")]
    Peers {
        /// File in which it was found.
        file: String,
        /// Names of the other nodes given to the command.
        expected: String,
        /// The peers in the file.
        found: String,
    },
    /// A peer's address isn't where that peer listens.
    #[error("{file}: peers.{peer}.{port} is {found}, expected {expected}, where {peer} listens")]
    Address {
        /// File in which it was found.
        file: String,
        /// Name of the peer that is wrong.
        peer: NodeId,
        /// Key of the port: `control` or `api`.
        port: &'static str,
        /// Address on which the peer listens.
        expected: String,
        /// Address that the file names.
        found: String,
    },
}

/// Founds a cluster of the given nodes.
pub fn found(configs: &[NodeConfig], random: &mut impl Rng, at: Wall) -> Result<Founding, FoundError> {
    let mut nodes = BTreeMap::new();
    for config in configs {
        if nodes.insert(config.id.clone(), config).is_some() {
            return Err(FoundError::Twice(config.file.display().to_string(), config.id.clone()));
        }
    }
    let mut directories = BTreeSet::new();
    for config in configs {
        if !directories.insert(&config.data_dir) {
            let (file, directory) = (config.file.display().to_string(), config.data_dir.display().to_string());
            return Err(FoundError::SharedDirectory(file, directory));
        }
    }
    nodes.values().try_for_each(|config| check_peers(config, &nodes))?;

    let cluster = ClusterId(random.random());
    let members: BTreeMap<_, _> = (nodes.keys())
        .map(|node| (node.clone(), Member { incarnation: Incarnation(random.random()), cordoned: false }))
        .collect();
    let operation = Operation::Genesis { cluster, members: Members(members.clone()) };
    let tx = TxId::new("genesis").expect("a word is an id");
    let intent = Intent { initiator: Initiator::Node, tx, actor: "cluster init".into(), digest: 0, at, operation };
    let record =
        Record { slot: Slot(0), prev_hash: Hash::default(), intent, state: None, phase: None, certificate: None };
    let head_hash = record.hash();
    let acceptor = |(node, member): (NodeId, Member)| {
        let incarnation = member.incarnation;
        let empty = (None, None, Slot(0));
        let (promised, accepted, head) = empty;
        (
            node.clone(),
            AcceptorState {
                cluster,
                node,
                incarnation,
                boot: 0,
                promised,
                accepted,
                head,
                head_hash,
                writes: 0,
                seen: BTreeMap::new(),
            },
        )
    };
    Ok(Founding {
        cluster,
        genesis: Chosen { ballot: None, decided_at: Wall(0), record },
        acceptors: members.into_iter().map(acceptor).collect(),
    })
}

fn port_of(address: &str) -> Option<&str> {
    address.rsplit_once(':').map(|(_, port)| port)
}

fn is_anywhere(address: &str) -> bool {
    address.parse::<std::net::SocketAddr>().is_ok_and(|address| address.ip().is_unspecified())
}

fn check_peers(config: &NodeConfig, nodes: &BTreeMap<NodeId, &NodeConfig>) -> Result<(), FoundError> {
    let file = config.file.display().to_string();
    let others: BTreeSet<_> = nodes.keys().filter(|node| **node != config.id).collect();
    let peers: BTreeSet<_> = config.peers.keys().collect();
    if others != peers {
        let list = |names: &BTreeSet<&NodeId>| match names.is_empty() {
            true => "none".to_string(),
            false => names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", "),
        };
        return Err(FoundError::Peers { file, expected: list(&others), found: list(&peers) });
    }
    for (name, peer) in &config.peers {
        let listen = &nodes[name].listen;
        for (port, found, expected) in [("control", &peer.control, &listen.control), ("api", &peer.api, &listen.api)] {
            // Who listens on every address is reached by whatever name its peers have for it.
            let anywhere = is_anywhere(expected) && port_of(expected) == port_of(found);
            if found != expected && !anywhere {
                let (expected, found) = (expected.clone(), found.clone());
                return Err(FoundError::Address { file, peer: name.clone(), port, expected, found });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(id: &str, peers: &[&str], dir: &str) -> NodeConfig {
        let port = |id: &str, base: u32| base + u32::from(id.as_bytes()[0]);
        let addresses = |id: &str| (port(id, 7000), port(id, 8000), port(id, 9000));
        let (control, api, data) = addresses(id);
        let mut text = format!(
            "[node]\nid = \"{id}\"\ndata_dir = \"{dir}\"\n[control]\nplaintext = true\n[listen]\n\
             control = \"127.0.0.1:{control}\"\napi = \"127.0.0.1:{api}\"\ndata = \"127.0.0.1:{data}\"\n"
        );
        for peer in peers {
            let (control, api, _) = addresses(peer);
            text += &format!("[peers.{peer}]\ncontrol = \"127.0.0.1:{control}\"\napi = \"127.0.0.1:{api}\"\n");
        }
        NodeConfig::parse(&text, Path::new("n.toml")).unwrap()
    }

    fn found_of(configs: &[NodeConfig]) -> Result<Founding, FoundError> {
        found(configs, &mut rand::rng(), Wall(1))
    }

    #[test]
    fn all_acceptor_states_remember_the_one_genesis() {
        let founding = found_of(&[config("a", &["b"], "x"), config("b", &["a"], "y")]).unwrap();
        let hash = founding.genesis.record.hash();
        assert!(founding.acceptors.values().all(|acceptor| acceptor.head_hash == hash));
        let lives: BTreeSet<_> = founding.acceptors.values().map(|acceptor| acceptor.incarnation).collect();
        assert_eq!(lives.len(), 2);
    }

    #[test]
    fn who_listens_everywhere_is_reached_by_any_name() {
        let (mut a, mut b) = (config("a", &["b"], "x"), config("b", &["a"], "y"));
        a.listen.control = format!("0.0.0.0:{}", 7000 + u32::from(b'a'));
        b.peers.get_mut(&a.id).unwrap().control = format!("node-a.svc:{}", 7000 + u32::from(b'a'));
        found_of(&[a.clone(), b.clone()]).unwrap();
        b.peers.get_mut(&a.id).unwrap().control = "node-a.svc:1".into();
        assert!(found_of(&[a, b]).unwrap_err().to_string().contains("expected 0.0.0.0:"));
    }

    #[test]
    fn files_that_disagree_found_nothing() {
        let peers = found_of(&[config("a", &["b"], "x"), config("b", &["a"], "y"), config("c", &["a", "b"], "z")]);
        assert_eq!(
            peers.unwrap_err().to_string(),
            "n.toml: peers are b, expected b, c: the other nodes given to this command"
        );
        let shared = found_of(&[config("a", &["b"], "x"), config("b", &["a"], "x")]).unwrap_err();
        assert_eq!(
            shared.to_string(),
            "n.toml names data_dir x, which another file names too; expected one for each node"
        );
        let twice = found_of(&[config("a", &[], "x"), config("a", &[], "y")]).unwrap_err();
        assert!(matches!(twice, FoundError::Twice(..)), "{twice}");
    }
}
