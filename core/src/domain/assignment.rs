//! How a user becomes a ticket: the hash function, and the salt that lets each rollout begin with other users.
//!
//! Requests and records of a topic are assigned by the same rule, on every node, without state.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};
use xxhash_rust::xxh64::xxh64;

use super::ids::ServiceId;
use super::weights::{Weight, sticky_ticket};

/// Function that makes a number of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HashFunction {
    /// XXH3 of 64 bits, with the salt as its seed.
    #[default]
    Xxh3,
    /// XXH64 with seed 0, as Envoy assigns requests to weighted clusters by a hash policy.
    Xxh64,
}

/// What a rollout file says about the salt of its assignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Salt {
    /// Nothing. A file: as `Rollout`, once every member knows it. A recorded rollout: as `None`.
    #[default]
    Unsaid,
    /// The service's alone, so that the same users come first in each rollout.
    None,
    /// The rollout's own: the slot of its start, which the cluster records; none in a file that was not applied yet.
    Rollout(Option<u64>),
}

/// How a rollout's users are assigned, as nodes tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct UserAssignment {
    /// Function that makes a number of a user's key.
    pub function: HashFunction,
    /// Slot of the start whose users these are, which `retry` keeps; none where the service's name alone is the salt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salt_slot: Option<u64>,
}

/// Makes tickets of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TicketHash {
    /// XXH3 with this salt as its seed.
    Salted(u64),
    /// XXH64 with seed 0.
    Xxh64,
}

impl TicketHash {
    /// Returns the hash of a service's users. Without a slot it is the one that releases before 0.3.0 assign by.
    pub fn of(service: &ServiceId, assignment: UserAssignment) -> Self {
        let salt = xxh3_64(service.as_str().as_bytes());
        match assignment {
            UserAssignment { function: HashFunction::Xxh64, .. } => Self::Xxh64,
            UserAssignment { salt_slot: None, .. } => Self::Salted(salt),
            UserAssignment { salt_slot: Some(slot), .. } => Self::Salted(xxh3_64_with_seed(&slot.to_le_bytes(), salt)),
        }
    }

    /// Returns a key's ticket: the canary has those below its weight, so that raising it takes no user back.
    pub fn ticket(self, key: &[u8]) -> u16 {
        match self {
            Self::Salted(salt) => sticky_ticket(salt, key),
            Self::Xxh64 => (xxh64(key, 0) % u64::from(Weight::WHOLE)) as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(service: &str, slot: Option<u64>) -> TicketHash {
        let assignment = UserAssignment { salt_slot: slot, ..UserAssignment::default() };
        TicketHash::of(&ServiceId::new(service).unwrap(), assignment)
    }

    fn first(hash: TicketHash, bp: u16) -> Vec<u32> {
        (0..20_000).filter(|user| hash.ticket(format!("u{user}").as_bytes()) < bp).collect()
    }

    #[test]
    fn without_a_slot_a_user_has_the_tickets_that_the_release_before_gave() {
        let of_fraud = ["u1", "u2", "u3"].map(|user| hash("fraud", None).ticket(user.as_bytes()));
        assert_eq!(of_fraud, [1714, 76, 9065]);
        assert_ne!(hash("fraud", None), hash("shop", None));
    }

    #[test]
    fn each_rollout_begins_with_other_users_and_takes_none_back() {
        let rollouts = [hash("s", None), hash("s", Some(3)), hash("s", Some(4)), hash("t", Some(3))];
        for (i, one) in rollouts.into_iter().enumerate() {
            let few = first(one, 1_000);
            assert!((1_800..=2_200).contains(&few.len()), "{} of 20000 are the first tenth", few.len());
            let more = first(one, 2_000);
            assert!(few.iter().all(|user| more.binary_search(user).is_ok()), "a rising weight takes nobody back");
            for other in &rollouts[..i] {
                let theirs = first(*other, 1_000);
                let both = few.iter().filter(|user| theirs.binary_search(user).is_ok()).count();
                // A tenth of a tenth of 20000 is 200; all 2000 of them would be the same users.
                assert!((140..=260).contains(&both), "{both} users are among the first of {one:?} and of {other:?}");
            }
        }
    }

    #[test]
    fn xxh64_is_what_envoy_hashes_by() {
        // XXH64 with seed 0 of "" and "abc", as the function's specification has them.
        assert_eq!(TicketHash::Xxh64.ticket(b""), (0xef46_db37_51d8_e999_u64 % 10_000) as u16);
        assert_eq!(TicketHash::Xxh64.ticket(b"abc"), (0x44bc_2cf5_ad77_0999_u64 % 10_000) as u16);
        let assignment = UserAssignment { function: HashFunction::Xxh64, salt_slot: None };
        let of = |service: &str| TicketHash::of(&ServiceId::new(service).unwrap(), assignment);
        assert_eq!((of("fraud"), of("shop")), (TicketHash::Xxh64, TicketHash::Xxh64), "no service is in it");
    }
}
