//! What a request's target and Host say: one authority, one path and query, or a refusal. Pure.

use std::borrow::Cow;

use crate::proxy::body::{BadMessage, refuse};

/// A request's target, whatever its form was.
#[derive(Debug, PartialEq, Eq)]
pub struct RequestTarget<'b> {
    /// The host that an absolute target names, which is meant whatever Host says (RFC 9112, 3.2.2).
    pub authority: Option<&'b str>,
    /// Begins with a slash, or is `*`.
    pub path_and_query: Cow<'b, str>,
}

impl<'b> RequestTarget<'b> {
    /// Reads a target in one of the forms that a server is sent (RFC 9112, 3.2): a path, an absolute URI of HTTP, or `*`
    /// with OPTIONS.
    pub fn of(method: &str, target: &'b str) -> Result<Self, BadMessage> {
        if target.starts_with('/') {
            return Ok(Self { authority: None, path_and_query: Cow::Borrowed(checked(target)?) });
        }
        if target == "*" && method == "OPTIONS" {
            return Ok(Self { authority: None, path_and_query: Cow::Borrowed("*") });
        }
        let Some(rest) = after_scheme(target) else {
            return refuse(400, "expected a path or an http:// URI as the request's target");
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(end);
        let authority = host(authority.as_bytes())?;
        if authority.is_empty() {
            return refuse(400, "found a target without a host");
        }
        let rest = checked(rest)?;
        let path_and_query = match rest {
            "" if method == "OPTIONS" => Cow::Borrowed("*"),
            "" => Cow::Borrowed("/"),
            _ if rest.starts_with('/') => Cow::Borrowed(rest),
            query => Cow::Owned(format!("/{query}")),
        };
        Ok(Self { authority: Some(authority), path_and_query })
    }
}

/// Returns what follows `http://` or `https://`.
fn after_scheme(target: &str) -> Option<&str> {
    let (scheme, rest) = target.split_once("://")?;
    let known = scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
    known.then_some(rest)
}

/// Returns a path and query unless a byte of it would mean something else to another recipient: a fragment, a blank, a control
/// character, or what no URI has in it.
fn checked(path_and_query: &str) -> Result<&str, BadMessage> {
    let mut in_query = false;
    for byte in path_and_query.bytes() {
        match byte {
            b'#' => return refuse(400, "found a fragment in the request's target"),
            b'?' => in_query = true,
            0..=b' ' | b'<' | b'>' | 0x7f => {
                return refuse(400, "found a byte in the request's target that no URI has");
            }
            b'`' if !in_query => return refuse(400, "found a byte in the request's target that no URI has"),
            b'"' if in_query => return refuse(400, "found a byte in the request's target that no URI has"),
            _ => {}
        }
    }
    Ok(path_and_query)
}

/// Returns a host and its port, if any (RFC 9110, 4.2.4: no user), or why it is none; an empty port is left out.
pub fn host(value: &[u8]) -> Result<&str, BadMessage> {
    const BAD: BadMessage = BadMessage { status: 400, why: "expected a host name and a port in Host" };
    let text = std::str::from_utf8(value).map_err(|_| BAD)?;
    let (name, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or(BAD)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| BAD)?;
            (&text[..address.len() + 2], port)
        }
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+;=".contains(&byte);
    if !name.starts_with('[') && !name.bytes().all(is_name) {
        return Err(BAD);
    }
    match port.strip_prefix(':') {
        None if port.is_empty() => Ok(text),
        Some("") if !name.is_empty() => Ok(name),
        Some(digits) if !name.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            digits.parse::<u16>().map(|_| text).map_err(|_| BAD)
        }
        _ => Err(BAD),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_target_has_one_meaning() {
        for (method, target, authority, path) in [
            ("GET", "/a?b=c", None, "/a?b=c"),
            ("GET", "//a/b", None, "//a/b"),
            ("GET", "http://x/a", Some("x"), "/a"),
            ("GET", "HTTP://x:80", Some("x:80"), "/"),
            ("GET", "https://x?b", Some("x"), "/?b"),
            ("GET", "http://x:/", Some("x"), "/"),
            ("OPTIONS", "http://x", Some("x"), "*"),
            ("OPTIONS", "*", None, "*"),
            ("GET", "/a?b?c`d", None, "/a?b?c`d"),
        ] {
            let found = RequestTarget::of(method, target).unwrap_or_else(|why| panic!("{target}: {why:?}"));
            assert_eq!((found.authority, &*found.path_and_query), (authority, path), "{target}");
        }
        for bad in [
            "",
            "hello",
            "foo:bar",
            "*",
            "x:80",
            "ftp://x/",
            "http:/x",
            "http:///a",
            "http://u@x/",
            "http://x y/",
            "/a#b",
            "#",
            "http://x#b",
            "/a b",
            "/a\tb",
            "/a\x7f",
            "/<",
            "/`",
            "/?\"",
            "mailto:a@b",
            "?a",
            "://x",
        ] {
            assert_eq!(RequestTarget::of("GET", bad).map_err(|why| why.status), Err(400), "{bad}");
        }
    }

    #[test]
    fn a_host_is_a_name_or_an_address_and_a_port() {
        for good in
            ["", "x", "x.example:80", "127.0.0.1:8080", "[::1]", "[2001:db8::1]:443", "a_b-c~d", "x:0", "x:65535"]
        {
            assert_eq!(host(good.as_bytes()), Ok(good));
        }
        assert_eq!((host(b"x:"), host(b"[::1]:")), (Ok("x"), Ok("[::1]")));
        for bad in [
            "u@x",
            "x/",
            "x/y",
            "x y",
            "x,y",
            "x:a",
            "x:-1",
            "x:65536",
            "x:80:80",
            "[x]",
            "[::1",
            "::1",
            "x#",
            "x?",
            ":",
            ":80",
            "x\"",
            "x\\",
            "<x>",
            "x%41",
            "ü",
            "[::1]x",
            "x:99999999999",
        ] {
            assert!(host(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(host(b"\xff").is_err());
    }
}
