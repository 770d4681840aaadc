//! What nodes say about themselves in HELLO: this node's own word, and the last word of each peer, kept while it is away.
//! Shown, never decided by.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::frame::Versions;
use crate::domain::ids::NodeId;

/// One node's word about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// The protocol versions that it speaks.
    pub versions: Versions,
    /// Its facts by name: `build`, and `format.NAME` for the version of each format that it writes.
    pub facts: BTreeMap<String, String>,
}

impl Greeting {
    /// Returns its build, such as `0.2.0 (3de05bc)`.
    pub fn build(&self) -> &str {
        self.facts.get("build").map_or("an unknown build", String::as_str)
    }

    /// Returns the format versions among the facts, by name.
    pub fn formats(&self) -> BTreeMap<String, String> {
        let facts = self.facts.iter();
        facts.filter_map(|(name, version)| Some((name.strip_prefix("format.")?.into(), version.clone()))).collect()
    }
}

/// The greetings of this node and of its configured peers, each node's last. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Greetings(Arc<Mutex<BTreeMap<NodeId, Greeting>>>);

impl Greetings {
    /// Keeps a node's word in the place of its last one.
    pub fn put(&self, node: NodeId, greeting: Greeting) {
        self.lock().insert(node, greeting);
    }

    /// Returns a node's last word; none before a peer's first HELLO to this process.
    pub fn of(&self, node: &NodeId) -> Option<Greeting> {
        self.lock().get(node).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Greeting>> {
        self.0.lock().expect("nothing panics while it holds the greetings")
    }
}
