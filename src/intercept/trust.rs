//! How the runtimes are told of the proxy, and made to trust it: files, and the environment variables
//! that name them.
//!
//! A variable either *replaces* what its runtime trusts, and then names a bundle of the system's roots and
//! ours, or *adds* to it, and then names our root alone.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memchr::memmem;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::ca::{self, Authority, CaError};
use super::certificates::is_ours;
use super::host::Host;
use super::stores;

/// What Java and its tools expect of a store that keeps no secret.
pub const STORE_PASSWORD: &str = "changeit";

/// What the entry of our root is called in stores.
const ALIAS: &str = "optin-proxy";

/// Loaded by Node versions that do not read HTTPS_PROXY themselves.
const NODE_PROXY: &str = include_str!("node-proxy.cjs");

/// Loaded by Ruby, whose Net::HTTP reads http_proxy even for https.
const RUBY_PROXY: &str = include_str!("ruby-proxy.rb");

/// Variables whose file replaces what is trusted.
const REPLACED: [&str; 8] = [
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "PERL_LWP_SSL_CA_FILE",
];

/// Variables whose file adds to what is trusted.
const ADDED: [&str; 2] = ["NODE_EXTRA_CA_CERTS", "DENO_CERT"];

/// The certificates that this system trusts, without any of ours.
pub fn system_roots() -> Vec<CertificateDer<'static>> {
    let mut roots = rustls_native_certs::load_native_certs().certs;
    roots.retain(|root| !is_ours(root));
    roots
}

/// Certificates as PEM, one behind the other.
pub fn pem_bundle<'c>(
    certificates: impl IntoIterator<Item = &'c CertificateDer<'static>>,
) -> String {
    let blocks: Vec<_> = certificates
        .into_iter()
        .map(|certificate| pem::Pem::new("CERTIFICATE", certificate.to_vec()))
        .collect();
    pem::encode_many(&blocks)
}

/// A trust store for Java: ours and these others, since it replaces Java's own.
pub fn java_store(root: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Vec<u8> {
    let others = others.iter().enumerate();
    let others = others.map(|(number, root)| (format!("system-{}", number + 1), &root[..]));
    let all = [(ALIAS.to_owned(), &root[..])].into_iter().chain(others);
    stores::jks(all, STORE_PASSWORD, SystemTime::now())
}

/// A PKCS#12 store with our root alone, for programs and systems that import one.
pub fn pkcs12_store(root: &CertificateDer<'_>) -> Vec<u8> {
    stores::pkcs12(ALIAS, root, STORE_PASSWORD)
}

/// A form in which clients are given what they have to trust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Export {
    /// Our root, as text
    Pem,
    /// Our root, as bytes
    Der,
    /// A PKCS#12 store of our root, to import (password `changeit`)
    P12,
    /// A Java trust store: our root and the system's, since it replaces Java's own (password `changeit`)
    Jks,
    /// Our root and the system's, as text, for variables that replace what is trusted
    Bundle,
}

impl Export {
    /// All forms.
    pub const ALL: [Self; 5] = [Self::Pem, Self::Der, Self::P12, Self::Jks, Self::Bundle];

    /// Its name in arguments and paths.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pem => "pem",
            Self::Der => "der",
            Self::P12 => "p12",
            Self::Jks => "jks",
            Self::Bundle => "bundle",
        }
    }

    /// Whether people can read it.
    pub const fn is_text(self) -> bool {
        matches!(self, Self::Pem | Self::Bundle)
    }

    /// What `authority`'s clients have to trust. Two of the forms read the system's roots.
    pub fn of(self, authority: &Authority) -> Vec<u8> {
        let root = authority.root();
        match self {
            Self::Pem => authority.root_pem().into_bytes(),
            Self::Der => root.to_vec(),
            Self::P12 => pkcs12_store(root),
            Self::Jks => java_store(root, &system_roots()),
            Self::Bundle => pem_bundle([root].into_iter().chain(&system_roots())).into_bytes(),
        }
    }
}

/// The files that variables name.
#[derive(Debug, Clone)]
pub struct Files {
    /// Our root, and what NODE_EXTRA_CA_CERTS named before.
    added: PathBuf,
    /// All that is to be trusted.
    bundle: PathBuf,
    /// The same for Java.
    java: PathBuf,
    /// A folder of php.ini fragments.
    php: PathBuf,
    node: PathBuf,
    ruby: PathBuf,
}

impl Files {
    /// Writes them into `folder`, made if need be. What `environment` trusts beyond the system is in
    /// them too.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(
        folder: &Path,
        authority: &Authority,
        environment: &impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, CaError> {
        let files = Self {
            added: folder.join("ca.pem"),
            bundle: folder.join("bundle.pem"),
            java: folder.join("truststore.jks"),
            php: folder.join("php"),
            node: folder.join("node-proxy.cjs"),
            ruby: folder.join("ruby-proxy.rb"),
        };
        let root = authority.root();
        let mut others = system_roots();
        for name in REPLACED {
            others.extend(named_by(environment(name)));
        }
        others.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
        others.dedup();
        let added: Vec<_> = ADDED.iter().flat_map(|name| named_by(environment(name))).collect();
        let ini = format!(
            "curl.cainfo={0:?}\nopenssl.cafile={0:?}\n",
            files.bundle.display().to_string()
        );
        let write = || -> io::Result<()> {
            std::fs::create_dir_all(&files.php)?;
            ca::write_public(
                &files.added,
                pem_bundle([root].into_iter().chain(&added)).as_bytes(),
            )?;
            ca::write_public(
                &files.bundle,
                pem_bundle([root].into_iter().chain(&others)).as_bytes(),
            )?;
            ca::write_public(&files.java, &java_store(root, &others))?;
            ca::write_public(&files.php.join("optin-proxy.ini"), ini.as_bytes())?;
            ca::write_public(&files.node, NODE_PROXY.as_bytes())?;
            ca::write_public(&files.ruby, RUBY_PROXY.as_bytes())
        };
        write().map_err(|error| CaError::File { path: folder.to_owned(), error })?;
        Ok(files)
    }
}

/// The certificates in a file that a variable names, without any of ours. A file that cannot be read was
/// of no use before either.
fn named_by(file: Option<OsString>) -> Vec<CertificateDer<'static>> {
    let certificates = file.and_then(|file| CertificateDer::pem_file_iter(file).ok());
    certificates
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|certificate| !is_ours(certificate))
        .collect()
}

/// A running proxy, as its clients reach it.
#[derive(Clone)]
pub struct Reached {
    /// Host and port.
    pub authority: String,
    /// `user:password@`, percent-encoded; empty if none are needed.
    pub credentials: String,
    /// The same for a field of Basic authentication.
    pub basic: Option<String>,
}

/// The variable, and the entry of it, that leads clients past the proxy to one of these hosts.
pub fn hidden(
    hosts: &[Host],
    environment: &impl Fn(&str) -> Option<OsString>,
) -> Option<(&'static str, String)> {
    ["NO_PROXY", "no_proxy"].into_iter().find_map(|variable| {
        let list = environment(variable)?.into_string().ok()?;
        let entry =
            entries(&list).find(|entry| hosts.iter().any(|host| is_excepted(entry, host)))?;
        Some((variable, entry.to_owned()))
    })
}

/// The entries of NO_PROXY, which some runtimes take apart at white space too.
fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.split(|char: char| char == ',' || char.is_ascii_whitespace()).filter(|it| !it.is_empty())
}

/// As most runtimes read an entry of NO_PROXY.
fn is_excepted(entry: &str, host: &Host) -> bool {
    let host = host.to_string();
    if entry == "*" {
        return true;
    }
    let entry = entry.trim_end_matches(":443").to_ascii_lowercase();
    let entry = entry.trim_start_matches('*').trim_start_matches('.');
    let is_below = || host.strip_suffix(entry).is_some_and(|above| above.ends_with('.'));
    !entry.is_empty() && (host == entry || is_below())
}

/// The variables that lead a program through the proxy and make it trust the files, beside what its
/// `environment` says already; and what could not be said, and why.
pub fn variables(
    proxy: &Reached,
    files: &Files,
    hosts: &[Host],
    environment: &impl Fn(&str) -> Option<OsString>,
) -> (Vec<(&'static str, OsString)>, Vec<String>) {
    let mut left_out = Vec::new();
    if let Some((variable, entry)) = hidden(hosts, environment) {
        left_out.push(format!("`{entry}` in {variable} leads past the proxy"));
    }
    let path = |path: &Path| path.as_os_str().to_owned();
    let appended = |name: &str, between: &str, more: OsString| {
        let mut value = environment(name).filter(|value| !value.is_empty()).unwrap_or_default();
        // Asked for within an environment that has it already, nothing is said twice.
        if memmem::find(value.as_encoded_bytes(), more.as_encoded_bytes()).is_some() {
            return value;
        }
        if !value.is_empty() {
            value.push(between);
        }
        value.push(more);
        value
    };
    let url = OsString::from(format!("http://{}{}", proxy.credentials, proxy.authority));
    let mut all = vec![("HTTPS_PROXY", url.clone()), ("https_proxy", url)];

    // The proxy refuses this machine's own addresses, so they stay direct as they were. What somebody wrote is
    // kept: it is for them to say what goes past the proxy.
    let written = ["NO_PROXY", "no_proxy"].into_iter().find_map(environment);
    let direct = written.unwrap_or_else(|| {
        let local = ["localhost", "127.0.0.1", "::1"].into_iter();
        let local =
            local.filter(|name| !name.parse().is_ok_and(|host: Host| hosts.contains(&host)));
        local.collect::<Vec<_>>().join(",").into()
    });
    if !direct.is_empty() {
        all.extend([("NO_PROXY", direct.clone()), ("no_proxy", direct.clone())]);
    }

    all.extend(REPLACED.map(|name| (name, path(&files.bundle))));
    // LWP reads the proxy variables only if told to.
    all.push(("PERL_LWP_ENV_PROXY", "1".into()));
    all.extend(ADDED.map(|name| (name, path(&files.added))));
    // Newer Nodes read HTTPS_PROXY if told to; for older ones there is a file to load.
    all.push(("NODE_USE_ENV_PROXY", "1".into()));
    // Node splits at spaces, but for quotes.
    let mut require = b"--require=\"".to_vec();
    for &byte in files.node.as_os_str().as_encoded_bytes() {
        require.extend(matches!(byte, b'"' | b'\\').then_some(b'\\'));
        require.push(byte);
    }
    require.push(b'"');
    all.push(("NODE_OPTIONS", appended("NODE_OPTIONS", " ", OsString::from_vec(require))));

    if files.ruby.as_os_str().as_encoded_bytes().iter().any(u8::is_ascii_whitespace) {
        let file = files.ruby.display();
        left_out.push(format!(
            "Ruby is not led through the proxy: RUBYOPT can name no path with spaces, like {file}"
        ));
    } else {
        let mut require = OsString::from("-r");
        require.push(&files.ruby);
        all.push(("RUBYOPT", appended("RUBYOPT", " ", require)));
    }

    let (host, port) = proxy.authority.rsplit_once(':').unwrap_or((&proxy.authority, "80"));
    let mut java = OsString::from(format!(
        "-Dhttps.proxyHost={} -Dhttps.proxyPort={port}",
        host.trim_matches(['[', ']'])
    ));
    if !direct.is_empty() {
        let direct = direct.to_string_lossy();
        let names = entries(&direct).map(|name| match name.strip_prefix('.') {
            Some(below) => format!("*.{below}"),
            None => name.to_owned(),
        });
        java.push(format!(" -Dhttp.nonProxyHosts={}", names.collect::<Vec<_>>().join("|")));
    }
    if proxy.basic.is_some() {
        left_out
            .push("Java is not led through the proxy: it sends no credentials by itself".into());
    } else if files.java.as_os_str().as_encoded_bytes().contains(&b'"') {
        let file = files.java.display();
        left_out.push(format!(
            "Java is not led through the proxy: JAVA_TOOL_OPTIONS can name no path with quotes, like {file}"
        ));
    } else {
        java.push(" -Djavax.net.ssl.trustStore=\"");
        java.push(&files.java);
        java.push(format!("\" -Djavax.net.ssl.trustStorePassword={STORE_PASSWORD}"));
        all.push(("JAVA_TOOL_OPTIONS", appended("JAVA_TOOL_OPTIONS", " ", java)));
    }

    // An empty entry is the folder that PHP was built with.
    let mut php = OsString::from(":");
    php.push(&files.php);
    all.push(("PHP_INI_SCAN_DIR", appended("PHP_INI_SCAN_DIR", "", php)));
    (all, left_out)
}
