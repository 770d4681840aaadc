//! Who may: bearer tokens with a role each, stored as hashes.

use std::sync::Arc;

use subtle::ConstantTimeEq;

use crate::domain::text::is_hidden;

/// Permissions of a token; each role includes those of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// May read everything but a backup, and change nothing.
    Viewer,
    /// May also change rollouts and report telemetry.
    Operator,
    /// May also change the cluster's members, and back the cluster up.
    Admin,
}

/// Owner of the token of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// The name; the role's where the tokens file gives none.
    pub name: Arc<str>,
    /// What a request with this token may do.
    pub role: Role,
}

/// Owners and hashes of the tokens that the API accepts.
#[derive(Clone)]
pub struct Tokens(Vec<(Actor, blake3::Hash)>);

/// A line of a tokens file is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "tokens file, line {0}: expected \"<viewer|operator|admin> [name] <blake3 of the token, 64 hexadecimal digits>\"; \
     `aviary token` makes one"
)]
pub struct TokensError(usize);

impl Tokens {
    /// Reads lines of a role, a name and a hash; the name may be missing, `#` begins a comment.
    pub fn parse(text: &str) -> Result<Self, TokensError> {
        let lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.split('#').next().unwrap_or("").trim()));
        let tokens = lines.filter(|(_, line)| !line.is_empty()).map(|(number, line)| {
            let words: Vec<_> = line.split_whitespace().collect();
            let (role, name, hash) = match words[..] {
                [role, hash] => (role, role, hash),
                [role, name, hash] => (role, name, hash),
                _ => return Err(TokensError(number)),
            };
            if name.contains(is_hidden) {
                return Err(TokensError(number));
            }
            let role = role.parse().map_err(|_| TokensError(number))?;
            let hash = blake3::Hash::from_hex(hash).map_err(|_| TokensError(number))?;
            Ok((Actor { name: name.into(), role }, hash))
        });
        Ok(Self(tokens.collect::<Result<_, _>>()?))
    }

    /// Returns how many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true when no token is accepted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whose a token is; none when it is unknown. Takes as long for any token.
    pub fn actor_of(&self, token: &str) -> Option<&Actor> {
        let found = blake3::hash(token.as_bytes());
        let same = |hash: &blake3::Hash| bool::from(hash.as_bytes().ct_eq(found.as_bytes()));
        self.0.iter().fold(None, |actor, (other, hash)| if same(hash) { Some(other) } else { actor })
    }
}

/// A word that names no role.
#[derive(Debug, thiserror::Error)]
#[error("found {0:?}, expected viewer, operator or admin")]
pub struct RoleError(String);

impl std::str::FromStr for Role {
    type Err = RoleError;

    fn from_str(text: &str) -> Result<Self, RoleError> {
        match text {
            "viewer" => Ok(Self::Viewer),
            "operator" => Ok(Self::Operator),
            "admin" => Ok(Self::Admin),
            _ => Err(RoleError(text.into())),
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_by_its_hash() {
        let (secret, look) = (blake3::hash(b"secret"), blake3::hash(b"look"));
        let tokens = Tokens::parse(&format!("# people\noperator alice {secret} # on call\nviewer {look}\n")).unwrap();
        let who = |token| tokens.actor_of(token).map(|actor| (&*actor.name, actor.role));
        assert_eq!(who("secret"), Some(("alice", Role::Operator)));
        assert_eq!(who("look"), Some(("viewer", Role::Viewer)));
        assert_eq!(who("Secret"), None);
        assert_eq!(Tokens::parse("\nroot abc").err(), Some(TokensError(2)));
        let hidden = format!("viewer a\u{1b}[2Jb {look}");
        assert_eq!(Tokens::parse(&hidden).err(), Some(TokensError(1)), "a name is printed");
    }
}
