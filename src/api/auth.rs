//! Who may: bearer tokens with a role each, stored as hashes.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{Method, StatusCode, header};
use subtle::ConstantTimeEq;

use super::{ApiState, error};

/// What a token allows; each role may what the one before may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Look.
    Viewer,
    /// Change rollouts.
    Operator,
    /// Change the cluster.
    Admin,
}

/// The tokens' hashes.
#[derive(Clone)]
pub struct Tokens(Vec<(Role, blake3::Hash)>);

/// A line of a tokens file is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tokens file, line {0}: expected \"<viewer|operator|admin> <blake3 of the token, 64 hexadecimal digits>\"")]
pub struct TokensError(usize);

impl Tokens {
    /// Reads lines of a role and a hash; `#` begins a comment.
    pub fn parse(text: &str) -> Result<Self, TokensError> {
        let lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.split('#').next().unwrap_or("").trim()));
        let tokens = lines.filter(|(_, line)| !line.is_empty()).map(|(number, line)| {
            let (role, hash) = line.split_once(char::is_whitespace).ok_or(TokensError(number))?;
            let role = match role {
                "viewer" => Role::Viewer,
                "operator" => Role::Operator,
                "admin" => Role::Admin,
                _ => return Err(TokensError(number)),
            };
            Ok((role, blake3::Hash::from_hex(hash.trim()).map_err(|_| TokensError(number))?))
        });
        Ok(Self(tokens.collect::<Result<_, _>>()?))
    }

    /// Returns the role of a token; none when it is unknown. Takes as long for any token.
    pub fn role_of(&self, token: &str) -> Option<Role> {
        let found = blake3::hash(token.as_bytes());
        let same = |hash: &blake3::Hash| bool::from(hash.as_bytes().ct_eq(found.as_bytes()));
        self.0.iter().fold(None, |role, (other, hash)| if same(hash) { Some(*other) } else { role })
    }
}

/// Lets a request through when its token's role is enough; everything passes where no tokens are configured, which is
/// on loopback only.
pub async fn check(State(state): State<ApiState>, request: Request, next: Next) -> Response {
    let Some(tokens) = &state.tokens else { return next.run(request).await };
    let path = request.uri().path();
    let needed = match (matches!(*request.method(), Method::GET | Method::HEAD), path) {
        (_, "/livez" | "/readyz") => return next.run(request).await,
        (true, _) => Role::Viewer,
        (false, path) if path.starts_with("/v1/cluster") => Role::Admin,
        (false, _) => Role::Operator,
    };
    let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let role = token.and_then(|value| value.strip_prefix("Bearer ")).and_then(|token| tokens.role_of(token.trim()));
    match role {
        Some(role) if role >= needed => next.run(request).await,
        Some(role) => error(StatusCode::FORBIDDEN, format!("the token's role is {role:?}, expected {needed:?}")),
        None => error(StatusCode::UNAUTHORIZED, "no known bearer token, expected header Authorization: Bearer …"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_by_its_hash() {
        let text = format!("# people\noperator {} # me\nviewer {}\n", blake3::hash(b"secret"), blake3::hash(b"look"));
        let tokens = Tokens::parse(&text).unwrap();
        assert_eq!((tokens.role_of("secret"), tokens.role_of("look")), (Some(Role::Operator), Some(Role::Viewer)));
        assert_eq!(tokens.role_of("Secret"), None);
        assert_eq!(Tokens::parse("\nroot abc").err(), Some(TokensError(2)));
    }
}
