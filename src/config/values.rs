//! Values that lead elsewhere: URLs, addresses, and files.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use http::uri::{Authority, Scheme, Uri};
use ipnet::IpNet;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Serialize, Serializer};

use super::file::Secret;
use crate::intercept::Host;
use crate::observe::admin::Token;
use crate::proxy::Credentials;

/// An address, or a network of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network(pub IpNet);

impl FromStr for Network {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map(Self).map_err(|_| "write an address, or a network like 10.0.0.0/8")
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

/// The origin in `upstream.url`. A path would have to be joined with the client's, which is passed on
/// byte for byte.
pub(super) fn parse_upstream(url: &str) -> Result<(Scheme, Authority), (&'static str, String)> {
    let fault = |why: &str| {
        ("upstream.url", format!("{why}: write it like https://api.constantcontact.com"))
    };
    // Of a fragment, the parser would say nothing.
    if url.contains(['?', '#']) {
        return Err(fault("has a query or a fragment, but requests have their own"));
    }
    let uri: Uri = url.parse().map_err(|_| fault("is not a URL"))?;
    let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
        return Err(fault("has no scheme or no host"));
    };
    if *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS {
        return Err(fault("is neither http nor https"));
    }
    if authority.as_str().contains('@') {
        return Err(fault("holds a user name, which belongs into the application's own requests"));
    }
    if authority.host().is_empty() {
        return Err(fault("has no host"));
    }
    let has_port = authority.as_str().len() > authority.host().len();
    if has_port && authority.port_u16().is_none_or(|port| port == 0) {
        return Err(fault("has a port that is none"));
    }
    if uri.path_and_query().is_some_and(|path| path != "/") {
        return Err(fault("has a path, but requests keep their own"));
    }
    Ok((scheme.clone(), authority.clone()))
}

/// The certificates in `upstream.ca_file`; `None` if there is none.
pub(super) fn load_authorities(
    path: &str,
) -> Result<Option<Vec<CertificateDer<'static>>>, (&'static str, String)> {
    if path.is_empty() {
        return Ok(None);
    }
    let fault = |why: String| {
        (
            "upstream.ca_file",
            format!("{path}: {why}; name a PEM file with the certificates to trust"),
        )
    };
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| fault(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in &certificates {
        roots.add(certificate.clone()).map_err(|error| fault(error.to_string()))?;
    }
    if certificates.is_empty() {
        return Err(fault("holds no certificate".into()));
    }
    Ok(Some(certificates))
}

/// `listen.proxy_auth`: the credentials themselves, or the file that holds them.
pub(super) fn load_credentials(
    written: &Secret,
) -> Result<Option<Credentials>, (&'static str, String)> {
    let Some(secret) = written.reveal() else { return Ok(None) };
    let read = read_secret("listen.proxy_auth", secret)?;
    let pair = read.as_deref().unwrap_or(secret);
    // Not a word of it is repeated: what is wrong may be a password without its user.
    let credentials = Credentials::new(pair).ok_or((
        "listen.proxy_auth",
        "must be user:password, or file:PATH of a file whose first line that is".to_owned(),
    ))?;
    Ok(Some(credentials))
}

/// `admin.token`: the token itself, or the file that holds it.
pub(super) fn load_token(written: &Secret) -> Result<Option<Token>, (&'static str, String)> {
    let Some(secret) = written.reveal() else { return Ok(None) };
    let read = read_secret("admin.token", secret)?;
    let token = Token::new(read.as_deref().unwrap_or(secret));
    Ok(Some(token.ok_or((
        "admin.token",
        "must be 16 or more visible characters, or file:PATH of a file whose first line that is"
            .to_owned(),
    ))?))
}

/// The most that is read of a file for its first line, in bytes: whoever names the wrong one shall not wait for all of it.
const FIRST_LINE: u64 = 64 * 1024;

/// The first line of the file that a secret names, if it names one.
fn read_secret(key: &'static str, secret: &str) -> Result<Option<String>, (&'static str, String)> {
    let Some(path) = secret.strip_prefix("file:") else { return Ok(None) };
    let read = || {
        let mut line = Vec::new();
        BufReader::new(File::open(path)?.take(FIRST_LINE)).read_until(b'\n', &mut line)?;
        if line.len() as u64 == FIRST_LINE {
            return Err(io::Error::other("its first line has no end within 64 KiB"));
        }
        String::from_utf8(line).map_err(|_| io::Error::other("its first line is no UTF-8 text"))
    };
    let line =
        read().map_err(|error| (key, format!("cannot read the file that it names: {error}")))?;
    Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned()))
}

/// The folder of the certificate authority, by the XDG base directory specification if none is written.
pub(super) fn ca_dir(written: &str) -> Option<PathBuf> {
    if !written.is_empty() {
        return Some(written.into());
    }
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|it| it.is_absolute());
    let data = variable("XDG_DATA_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local").join("share")))?;
    Some(data.join("optin-proxy"))
}

/// Whether there is a host in it, and a port.
///
/// # Errors
/// The key, and what to write.
pub(crate) fn check_address(
    key: &'static str,
    address: &str,
) -> Result<(), (&'static str, String)> {
    if is_address(address) {
        return Ok(());
    }
    Err((key, "must be a host and a port, like 127.0.0.1:8080 (port 0: any that is free)".into()))
}

/// Whether there is a host in it, an IPv6 address in brackets, and a port.
pub(crate) fn is_address(text: &str) -> bool {
    let is_host = |host: &str| !host.contains(':') || host.starts_with('[');
    text.parse::<SocketAddr>().is_ok()
        || text.rsplit_once(':').is_some_and(|(host, port)| {
            is_host(host) && host.parse::<Host>().is_ok() && port.parse::<u16>().is_ok()
        })
}
