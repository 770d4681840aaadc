//! Cookies by which clients keep their version: read from requests, and given to clients that have none.

use std::fmt::Write;

use http::header::SET_COOKIE;
use http::{HeaderMap, HeaderValue};

use crate::domain::plan::{HashOn, RolloutSpec, SetCookie};
use crate::entropy;

use super::request::{HeaderFields, is};

/// Returns the value of the cookie `name`; HTTP/2 may send each cookie in a field of its own.
pub fn find<'b>(fields: HeaderFields<'_, 'b>, name: &str) -> Option<&'b [u8]> {
    fields.iter().filter(|field| is(field.name, "cookie")).find_map(|field| find_in(field.value, name))
}

/// Returns the value of the cookie `name` in a Cookie field (RFC 6265, 4.2.1).
fn find_in<'f>(field: &'f [u8], name: &str) -> Option<&'f [u8]> {
    let mut pairs = field.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
    pairs.find_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

/// The cookie that a service's clients are given.
#[derive(Debug)]
pub struct CookieRule {
    name: String,
    /// What follows the value in Set-Cookie.
    attributes: String,
}

/// A cookie for a client that has none.
#[derive(Debug)]
pub struct NewCookie {
    /// Value of the cookie, by which the client is assigned from now on.
    pub value: String,
    /// Value of the field Set-Cookie.
    field: String,
}

impl CookieRule {
    /// Returns the rule of a rollout; none where applications set the cookie.
    pub fn of(spec: &RolloutSpec) -> Option<Self> {
        let (SetCookie { max_age_ms }, HashOn::Cookie(name)) = (spec.set_cookie?, spec.hash_on.as_ref()?) else {
            return None;
        };
        let age = max_age_ms.map(|ms| format!("; Max-Age={}", ms / 1_000)).unwrap_or_default();
        Some(Self { name: name.clone(), attributes: format!("; Path=/{age}; HttpOnly; SameSite=Lax") })
    }

    /// Returns the cookie that a client gets with its answer; none if it has one. An empty one is none.
    pub fn for_client(&self, fields: HeaderFields) -> Option<Box<NewCookie>> {
        if find(fields, &self.name).is_some_and(|value| !value.is_empty()) {
            return None;
        }
        let (mut value, Self { name, attributes }) = (String::with_capacity(32), self);
        let _ = write!(value, "{:032x}", entropy::bits());
        let field = format!("{name}={value}{attributes}");
        Some(Box::new(NewCookie { value, field }))
    }
}

impl NewCookie {
    /// Adds the field to an answer.
    pub fn put(&self, headers: &mut HeaderMap) {
        if let Ok(value) = HeaderValue::from_str(&self.field) {
            headers.append(SET_COOKIE, value);
        }
    }

    /// Returns whole header lines, and the one that gives the cookie behind them.
    pub fn behind(&self, lines: &[u8]) -> Vec<u8> {
        [lines, b"set-cookie: ", self.field.as_bytes(), b"\r\n"].concat()
    }
}

#[cfg(test)]
mod tests {
    use httparse::Header;

    use super::*;

    #[test]
    fn cookies_are_found_by_their_whole_name() {
        let field = b"a=1; sid=me=you;  xsid=other; empty=";
        assert_eq!(find_in(field, "sid"), Some(&b"me=you"[..]));
        assert_eq!(find_in(field, "xsid"), Some(&b"other"[..]));
        assert_eq!((find_in(field, "si"), find_in(field, "empty")), (None, Some(&b""[..])));
    }

    #[test]
    fn a_client_without_the_cookie_gets_one_of_its_own() {
        let rule = CookieRule { name: "sid".into(), attributes: "; Path=/".into() };
        let given = |cookies: &'static str| rule.for_client(&[Header { name: "Cookie", value: cookies.as_bytes() }]);
        assert!(given("a=1; sid=x").is_none());
        let (one, other) = (given("a=1").unwrap(), given("a=1; sid=").unwrap());
        assert_ne!(one.value, other.value);
        assert_eq!((one.value.len(), &one.field), (32, &format!("sid={}; Path=/", one.value)));
        assert_eq!(one.behind(b"a: b\r\n"), format!("a: b\r\nset-cookie: {}\r\n", one.field).into_bytes());
    }
}
