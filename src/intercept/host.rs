//! Hosts as a client names them, and patterns that match them.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use rustls::pki_types::{InvalidDnsNameError, ServerName};
use serde::{Serialize, Serializer};

/// A host in one spelling: a DNS name in lower case without its final dot, or an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// A DNS name.
    Name(Box<str>),
    /// An address; one that maps an IPv4 address into IPv6 is that IPv4 address.
    Address(IpAddr),
}

/// Why something is no host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// RFC 1035 section 2.3.4.
    #[error("a host has 1 to 253 characters, and 1 to 63 between two dots")]
    Length,
    /// RFC 1123 section 2.1, and the underscore that names in use have.
    #[error("a host is made of letters, digits, hyphens, underscores and dots")]
    Character,
    /// `127.1`, `0x7f000001` and `2130706433` are one host to some resolvers and none to others.
    #[error("write an IPv4 address as four decimal numbers without leading zeros")]
    Numeric,
}

impl FromStr for Host {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        if let Some(address) = bracketed {
            let address: Ipv6Addr = address.parse().map_err(|_| HostError::Character)?;
            return Ok(Self::Address(IpAddr::V6(address).to_canonical()));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Address(address.to_canonical()));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.is_empty() || name.len() > 253 {
            return Err(HostError::Length);
        }
        for label in name.split('.') {
            if label.is_empty() || label.len() > 63 {
                return Err(HostError::Length);
            }
            let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            if !label.bytes().all(is_allowed) {
                return Err(HostError::Character);
            }
        }
        let last = name.rsplit('.').next().unwrap_or(name);
        let hexadecimal = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
        let is_number = last.bytes().all(|byte| byte.is_ascii_digit())
            || hexadecimal.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if is_number {
            return Err(HostError::Numeric);
        }
        Ok(Self::Name(name.to_ascii_lowercase().into()))
    }
}

impl fmt::Display for Host {
    /// As it stands in a URL.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

impl Serialize for Host {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl TryFrom<&Host> for ServerName<'static> {
    type Error = InvalidDnsNameError;

    fn try_from(host: &Host) -> Result<Self, InvalidDnsNameError> {
        match host {
            Host::Name(name) => Self::try_from(name.to_string()),
            Host::Address(address) => Ok(Self::IpAddress((*address).into())),
        }
    }
}

/// Hosts, or one of their ports: `example.org`, `*.example.org` (every name below it), `*`, each with or
/// without `:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    hosts: Hosts,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    All,
    One(Host),
    /// The name and its dot in front.
    Below(Box<str>),
}

impl Pattern {
    /// Whether this port of this host is meant.
    pub fn means(&self, host: &Host, port: u16) -> bool {
        self.names(host) && self.port.is_none_or(|only| only == port)
    }

    /// Whether a host is among those meant, whatever the port.
    fn names(&self, host: &Host) -> bool {
        match (&self.hosts, host) {
            (Hosts::All, _) => true,
            (Hosts::One(one), host) => one == host,
            (Hosts::Below(suffix), Host::Name(name)) => name.ends_with(&**suffix),
            (Hosts::Below(_), Host::Address(_)) => false,
        }
    }

    /// The only port that is meant, if there is one.
    pub fn port(&self) -> Option<u16> {
        self.port
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // An IPv6 address has colons of its own.
        let is_address = text.ends_with(']') || text.parse::<IpAddr>().is_ok();
        let (hosts, port) = match text.rsplit_once(':') {
            Some((hosts, port)) if !is_address => {
                let port = port.parse::<u16>().ok().filter(|port| *port > 0);
                (hosts, Some(port.ok_or("a port is a number from 1 to 65535")?))
            }
            _ => (text, None),
        };
        let host = |text: &str| text.parse::<Host>().map_err(|error| error.to_string());
        let hosts = match hosts.strip_prefix('*') {
            Some("") => Hosts::All,
            Some(suffix) => match suffix.strip_prefix('.').map(host) {
                Some(Ok(Host::Name(name))) => Hosts::Below(format!(".{name}").into()),
                _ => return Err("write * only alone or before a dot, like *.example.org".into()),
            },
            None => Hosts::One(host(hosts)?),
        };
        Ok(Self { hosts, port })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hosts {
            Hosts::All => f.write_str("*")?,
            Hosts::One(host) => host.fmt(f)?,
            Hosts::Below(suffix) => write!(f, "*{suffix}")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_one_spelling() {
        for (written, meant) in [
            ("API.ConstantContact.com.", "api.constantcontact.com"),
            ("127.0.0.1", "127.0.0.1"),
            ("[::1]", "[::1]"),
            ("::1", "[::1]"),
            ("[::ffff:10.0.0.1]", "10.0.0.1"),
            ("my_host", "my_host"),
        ] {
            assert_eq!(written.parse::<Host>().map(|host| host.to_string()).as_deref(), Ok(meant));
        }
    }

    #[test]
    fn what_resolvers_read_in_different_ways_is_no_host() {
        for text in
            ["127.1", "0x7f.1", "2130706433", "0x7f000001", "010.0.0.1", "1.2.3.4.5", "a.0x1"]
        {
            assert_eq!(text.parse::<Host>(), Err(HostError::Numeric), "{text}");
        }
        let long = "a".repeat(64);
        for text in
            ["", ".", "a..b", ".a", "a b", "a/b", "a@b", "ä.example", "a%41", "[a]", "[::1", &long]
        {
            assert!(text.parse::<Host>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_pattern_matches_at_the_borders_of_labels() {
        let matches = |pattern: &str, host: &str| {
            let pattern: Pattern = pattern.parse().expect("a pattern");
            pattern.names(&host.parse().expect("a host"))
        };
        assert!(matches("*.example.org", "www.example.org"));
        assert!(!matches("*.example.org", "example.org"));
        assert!(!matches("*.example.org", "badexample.org"));
        assert!(matches("Example.org.", "EXAMPLE.ORG"));
        assert!(matches("*", "10.0.0.1"));
        assert!(matches("10.0.0.1:8443", "10.0.0.1"));
        assert_eq!("[::1]:443".parse::<Pattern>().map(|it| it.port()), Ok(Some(443)));
        // Regression, found by fuzzing: the last group of a bracketed address was taken for a port.
        for address in ["::1", "[::1]", "[2001:db8::8443]"] {
            assert_eq!(address.parse::<Pattern>().map(|it| it.port()), Ok(None), "{address}");
        }
        for wrong in ["*example.org", "a.*.org", "*.10.0.0.1", "a:0", "a:x", "a:65536", ""] {
            assert!(wrong.parse::<Pattern>().is_err(), "{wrong}");
        }
    }
}
