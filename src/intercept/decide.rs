//! Where a client may be connected to. Pure: names and addresses in, verdicts out.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize, Serializer};

use super::host::{Host, Pattern};

/// `[intercept]`, as far as it decides about targets.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The hosts whose TLS is opened.
    pub hosts: Vec<Host>,
    /// Whether other hosts are served at all.
    pub other_hosts: OtherHosts,
    /// Ports that any host may be asked for.
    pub ports: Vec<u16>,
    /// Hosts that are served even if others are not, and further ports.
    pub allow: Vec<Pattern>,
    /// Hosts that are never served.
    pub deny: Vec<Pattern>,
    /// What may be private.
    pub allow_private: Vec<Private>,
}

/// `intercept.other_hosts`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OtherHosts {
    /// Pass their bytes on unseen.
    #[default]
    Tunnel,
    /// Refuse them.
    Deny,
}

/// An entry of `intercept.allow_private`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Private {
    /// Addresses.
    Net(IpNet),
    /// Whatever this name stands for.
    Name(Host),
}

impl FromStr for Private {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(net) = text.parse() {
            return Ok(Self::Net(net));
        }
        match text.parse() {
            Ok(Host::Address(address)) => Ok(Self::Net(address.into())),
            Ok(name) => Ok(Self::Name(name)),
            Err(_) => Err("write an address, a network like 10.0.0.0/8, or a host".into()),
        }
    }
}

impl fmt::Display for Private {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(net) => net.fmt(f),
            Self::Name(host) => host.fmt(f),
        }
    }
}

impl Serialize for Private {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What becomes of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It is the API: its requests take the stack.
    Intercept,
    /// It is somebody else's.
    Elsewhere,
}

/// Why a target is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// By an entry of `intercept.deny`.
    #[error("{host} is denied by `{rule}` in intercept.deny")]
    Rule {
        /// The target's host.
        host: Host,
        /// The entry.
        rule: Pattern,
    },
    /// Not a port of `intercept.ports`.
    #[error("port {port} is not in intercept.ports, nor is `{host}:{port}` in intercept.allow")]
    Port {
        /// The target's host.
        host: Host,
        /// The port.
        port: u16,
    },
    /// `intercept.other_hosts = "deny"`
    #[error(
        "{host} is not in intercept.hosts or intercept.allow, and intercept.other_hosts is \"deny\""
    )]
    OtherHost {
        /// The target's host.
        host: Host,
    },
    /// An address that only this machine or its network can reach.
    #[error("{} {class} that intercept.allow_private does not name", address_of(.host, .address))]
    Private {
        /// The target's host.
        host: Host,
        /// What it stands for.
        address: IpAddr,
        /// What kind of address that is.
        class: &'static str,
    },
    /// The proxy would speak to itself.
    #[error("{address} is the proxy's own listener: ask for the host that is meant")]
    OwnListener {
        /// The target.
        address: SocketAddr,
    },
}

impl Rules {
    /// Judges a target by its name. `plain` is the absolute form, for which port 80 counts as allowed.
    ///
    /// # Errors
    /// The rule that refuses it.
    pub fn judge(&self, host: &Host, port: u16, plain: bool) -> Result<Way, Denied> {
        self.judge_denial(host, port)?;
        let meant = |pattern: &&Pattern| pattern.means(host, port);
        let allowed = self.allow.iter().filter(meant).collect::<Vec<_>>();
        let is_usual = self.ports.contains(&port) || (plain && port == 80);
        if !is_usual && !allowed.iter().any(|pattern| pattern.port().is_some()) {
            return Err(Denied::Port { host: host.clone(), port });
        }
        if self.hosts.contains(host) {
            return Ok(Way::Intercept);
        }
        if self.other_hosts == OtherHosts::Deny && allowed.is_empty() {
            return Err(Denied::OtherHost { host: host.clone() });
        }
        Ok(Way::Elsewhere)
    }

    /// Judges a target by `intercept.deny` alone.
    ///
    /// # Errors
    /// The entry that refuses it.
    pub fn judge_denial(&self, host: &Host, port: u16) -> Result<(), Denied> {
        match self.deny.iter().find(|pattern| pattern.means(host, port)) {
            Some(rule) => Err(Denied::Rule { host: host.clone(), rule: rule.clone() }),
            None => Ok(()),
        }
    }

    /// Judges what a host's name stands for. `own` are the proxy's listeners.
    ///
    /// # Errors
    /// The rule that refuses it.
    pub fn judge_address(
        &self,
        host: &Host,
        address: SocketAddr,
        own: &[SocketAddr],
    ) -> Result<(), Denied> {
        let ip = address.ip().to_canonical();
        if own.iter().any(|own| own.port() == address.port() && is_reached_by(own.ip(), ip)) {
            return Err(Denied::OwnListener { address });
        }
        // What is denied by its address is denied by any name.
        self.judge_denial(&Host::Address(ip), address.port())?;
        let Some(class) = class(ip) else { return Ok(()) };
        let is_named = self.allow_private.iter().any(|entry| match entry {
            Private::Net(net) => net.contains(&ip),
            Private::Name(name) => name == host,
        });
        if is_named {
            return Ok(());
        }
        Err(Denied::Private { host: host.clone(), address: ip, class })
    }
}

fn address_of(host: &Host, address: &IpAddr) -> String {
    match host {
        Host::Name(name) => format!("{name} stands for {address},"),
        Host::Address(_) => format!("{address} is"),
    }
}

/// Whether a connection to `target` arrives at a listener that is bound to `bound`.
fn is_reached_by(bound: IpAddr, target: IpAddr) -> bool {
    let bound = bound.to_canonical();
    // The system takes "any address" as a target for the loopback one.
    let target = match target {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    bound == target || (bound.is_unspecified() && is_this_machine(target))
}

/// Whether an address is one of this machine's: then a socket towards it gets that same address. Nothing
/// is sent.
fn is_this_machine(ip: IpAddr) -> bool {
    let any: IpAddr =
        if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let towards = || {
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.connect((ip, 9))?;
        socket.local_addr()
    };
    ip.is_loopback() || towards().is_ok_and(|local| local.ip() == ip)
}

/// What kind of address this is, if it is not for the whole Internet.
fn class(ip: IpAddr) -> Option<&'static str> {
    match ip.to_canonical() {
        IpAddr::V4(ip) => class_v4(ip),
        IpAddr::V6(ip) => class_v6(ip),
    }
}

fn class_v4(ip: Ipv4Addr) -> Option<&'static str> {
    let [first, second, ..] = ip.octets();
    match () {
        // RFC 1122 section 3.2.1.3: "this network".
        () if first == 0 => Some("an unspecified address"),
        () if ip.is_loopback() => Some("a loopback address"),
        () if ip.is_private() => Some("a private address"),
        // Where clouds keep credentials for whoever asks.
        () if ip.is_link_local() => Some("a link-local address"),
        // RFC 6598
        () if first == 100 && second & 0xC0 == 64 => {
            Some("a carrier-grade NAT address (100.64.0.0/10)")
        }
        () if ip.is_multicast() => Some("a multicast address"),
        // RFC 6890: protocol assignments, benchmarks, and what was never given out.
        () if ip.octets()[..3] == [192, 0, 0] => Some("a reserved address"),
        () if first == 198 && second & 0xFE == 18 => Some("a reserved address"),
        // RFC 5737: for examples.
        () if matches!(ip.octets()[..3], [192, 0, 2] | [198, 51, 100] | [203, 0, 113]) => {
            Some("a reserved address")
        }
        () if first >= 240 => Some("a reserved address"),
        () => None,
    }
}

fn class_v6(ip: Ipv6Addr) -> Option<&'static str> {
    let [first, second, third, fourth, .., seventh, eighth] = ip.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        class_v4(Ipv4Addr::new(a, b, c, d))
    };
    match () {
        () if ip.is_unspecified() => Some("an unspecified address"),
        () if ip.is_loopback() => Some("a loopback address"),
        () if ip.is_unique_local() => Some("a private address"),
        () if ip.is_unicast_link_local() => Some("a link-local address"),
        // RFC 3879: deprecated, and routed by some still.
        () if first & 0xFFC0 == 0xFEC0 => Some("a private address"),
        () if ip.is_multicast() => Some("a multicast address"),
        // IPv4 in disguise: compatible (RFC 4291), NAT64 (RFC 6052), 6to4 (RFC 3056).
        () if ip.octets()[..12] == [0; 12] => embedded(seventh, eighth),
        () if ip.segments()[..6] == [0x64, 0xFF9B, 0, 0, 0, 0] => embedded(seventh, eighth),
        () if ip.segments()[..6] == [0, 0, 0, 0, 0xFFFF, 0] => embedded(seventh, eighth),
        () if first == 0x2002 => embedded(second, third),
        // RFC 8215: for translation within a network. RFC 4380: Teredo. RFC 6666: nowhere.
        () if ip.segments()[..3] == [0x64, 0xFF9B, 1] => Some("a private address"),
        () if first == 0x2001 && second == 0 => Some("a reserved address"),
        // RFC 3849 and RFC 9637: for examples.
        () if first == 0x2001 && second == 0xDB8 => Some("a reserved address"),
        () if first == 0x3FFF && second < 0x1000 => Some("a reserved address"),
        () if [first, second, third, fourth] == [0x100, 0, 0, 0] => Some("a reserved address"),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            hosts: vec!["api.example".parse().expect("a host")],
            other_hosts: OtherHosts::Tunnel,
            ports: vec![443],
            allow: vec![],
            deny: vec![],
            allow_private: vec![],
        }
    }

    fn judge(rules: &Rules, host: &str, port: u16, plain: bool) -> Result<Way, Denied> {
        rules.judge(&host.parse().expect("a host"), port, plain)
    }

    #[test]
    fn only_the_hosts_named_are_intercepted() {
        let rules = rules();
        assert_eq!(judge(&rules, "API.example.", 443, false), Ok(Way::Intercept));
        for other in ["www.api.example", "example", "api.example.org", "notapi.example"] {
            assert_eq!(judge(&rules, other, 443, false), Ok(Way::Elsewhere));
        }
    }

    #[test]
    fn a_port_must_be_listed_or_allowed_for_its_host() {
        let mut rules = rules();
        for (port, plain, fine) in
            [(443, false, true), (80, false, false), (80, true, true), (8443, true, false)]
        {
            assert_eq!(judge(&rules, "a.org", port, plain).is_ok(), fine, "{port} {plain}");
        }
        rules.allow = vec!["a.org:8443".parse().expect("a pattern")];
        assert_eq!(judge(&rules, "a.org", 8443, false), Ok(Way::Elsewhere));
        assert!(judge(&rules, "b.org", 8443, false).is_err());
        rules.allow = vec!["a.org".parse().expect("a pattern")];
        assert!(judge(&rules, "a.org", 8443, false).is_err(), "a host alone allows no port");
    }

    #[test]
    fn denial_counts_most_and_names_its_rule() {
        let mut rules = rules();
        rules.deny = vec!["*.example".parse().expect("a pattern")];
        rules.allow = vec!["*".parse().expect("a pattern")];
        let denied = judge(&rules, "api.example", 443, false).expect_err("denied");
        assert_eq!(denied.to_string(), "api.example is denied by `*.example` in intercept.deny");
        rules.deny.clear();
        rules.allow = vec!["a.org".parse().expect("a pattern")];
        rules.other_hosts = OtherHosts::Deny;
        assert_eq!(judge(&rules, "a.org", 443, false), Ok(Way::Elsewhere));
        assert_eq!(judge(&rules, "api.example", 443, false), Ok(Way::Intercept));
        assert!(matches!(judge(&rules, "b.org", 443, false), Err(Denied::OtherHost { .. })));
    }

    #[test]
    fn addresses_that_are_not_for_everybody_are_refused_in_every_disguise() {
        for (address, refused) in [
            ("127.0.0.1", true),
            ("127.255.255.254", true),
            ("0.0.0.0", true),
            ("0.1.2.3", true),
            ("10.0.0.1", true),
            ("172.16.0.1", true),
            ("172.15.255.255", false),
            ("172.32.0.1", false),
            ("192.168.1.1", true),
            ("169.254.169.254", true),
            ("100.64.0.1", true),
            ("100.127.255.255", true),
            ("100.63.255.255", false),
            ("100.128.0.1", false),
            ("224.0.0.1", true),
            ("255.255.255.255", true),
            ("192.0.0.192", true),
            ("198.18.0.1", true),
            ("198.19.255.255", true),
            ("198.20.0.1", false),
            ("192.0.2.1", true),
            ("198.51.100.1", true),
            ("203.0.113.1", true),
            ("2001:db8::1", true),
            ("3fff:fff::1", true),
            ("3fff:1000::1", false),
            ("240.0.0.1", true),
            ("8.8.8.8", false),
            ("64:ff9b:1::a00:1", true),
            ("::ffff:0:a00:1", true),
            ("2001:0:a00:1::1", true),
            ("2001:4860:4860::8888", false),
            ("100::1", true),
            ("::", true),
            ("::1", true),
            ("::127.0.0.1", true),
            ("::ffff:127.0.0.1", true),
            ("::ffff:169.254.169.254", true),
            ("::ffff:8.8.8.8", false),
            ("64:ff9b::a00:1", true),
            ("64:ff9b::808:808", false),
            ("2002:a00:1::", true),
            ("2002:808:808::", false),
            ("fc00::1", true),
            ("fd12::1", true),
            ("fe80::1", true),
            ("fec0::1", true),
            ("ff02::1", true),
            ("2606:4700::1111", false),
        ] {
            let address: IpAddr = address.parse().expect("an address");
            let judged =
                rules().judge_address(&Host::Address(address), SocketAddr::new(address, 443), &[]);
            assert_eq!(judged.is_err(), refused, "{address}: {judged:?}");
        }
    }

    #[test]
    fn what_is_private_may_be_named_by_address_network_or_host() {
        let host: Host = "intranet.example".parse().expect("a host");
        let address = SocketAddr::from(([10, 1, 2, 3], 443));
        for (entry, fine) in [
            ("10.1.2.3", true),
            ("10.0.0.0/8", true),
            ("intranet.example", true),
            ("10.1.2.4", false),
            ("other.example", false),
        ] {
            let mut rules = rules();
            rules.allow_private = vec![entry.parse().expect("an entry")];
            assert_eq!(rules.judge_address(&host, address, &[]).is_ok(), fine, "{entry}");
        }
    }

    #[test]
    fn the_proxys_own_listeners_are_refused_whatever_is_allowed() {
        let mut rules = rules();
        rules.allow_private = vec!["0.0.0.0/0".parse().expect("a network")];
        for (own, target, refused) in [
            ("127.0.0.1:8080", "127.0.0.1:8080", true),
            ("127.0.0.1:8080", "0.0.0.0:8080", true),
            ("127.0.0.1:8080", "127.0.0.1:8081", false),
            ("127.0.0.1:8080", "127.0.0.2:8080", false),
            ("0.0.0.0:8080", "127.0.0.2:8080", true),
            ("0.0.0.0:8080", "10.255.255.1:8080", false),
            ("127.0.0.1:8080", "[::ffff:127.0.0.1]:8080", true),
        ] {
            let target: SocketAddr = target.parse().expect("an address");
            let host = Host::Address(target.ip());
            let judged = rules.judge_address(&host, target, &[own.parse().expect("an address")]);
            assert_eq!(judged.is_err(), refused, "{own} {target}");
        }
    }
}
