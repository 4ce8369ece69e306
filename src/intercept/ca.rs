//! The certificate authority of HTTPS_PROXY mode, on disk and in use.
//!
//! A root signs one issuing authority and its key is thrown away. The issuing authority is constrained to
//! `intercept.hosts`, so that its key, were it stolen, could impersonate these hosts and no other. The
//! constraint does not stand in the root: Java ignores it there.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{Issuer, KeyPair};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::certificates;
use super::host::Host;

/// The secret file: the issuing authority's key, its certificate, and the root's.
const ISSUER_FILE: &str = "issuer.pem";
/// The public file: the root's certificate, which clients have to trust.
const ROOT_FILE: &str = "ca.pem";

/// From when on the end of the authority is worth a warning.
pub const NEARLY_OVER: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// An authority, ready to sign.
pub struct Authority {
    root: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// Why there is no authority to work with.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Neither `intercept.ca_dir` nor the environment names a folder.
    #[error("no folder for the certificate authority: set intercept.ca_dir, or HOME")]
    NoFolder,
    /// `ca init` where there is one already.
    #[error(
        "there is a certificate authority in {0} already, and it is never overwritten; move that folder away to begin a new one"
    )]
    Exists(PathBuf),
    /// There is nothing to sign for.
    #[error(
        "intercept.hosts is empty: there is nothing that a certificate authority could vouch for"
    )]
    NoHosts,
    /// A file or folder cannot be read or written.
    #[error(
        "{path}: {error}; see that this user may read and write it, or choose another folder in intercept.ca_dir"
    )]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// Others may read the key.
    #[error(
        "{path}: other users may read this key (mode {mode:o}); if nobody has, `chmod 600 {path}`, else move the folder away and run `optin-proxy ca init`"
    )]
    Exposed {
        /// The secret file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Others may put a key of theirs in its place.
    #[error(
        "{path}: other users may change what is here ({why}); choose a folder of this user's own in intercept.ca_dir, with mode 700"
    )]
    Untrusted {
        /// The folder or file.
        path: PathBuf,
        /// Mode or owner.
        why: String,
    },
    /// The secret file is not what it should be.
    #[error(
        "{path}: {why}; move the folder away, run `optin-proxy ca init`, restart `serve`, and let clients trust the new one"
    )]
    Broken {
        /// The secret file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The clock is wrong.
    #[error("{path}: valid from {from} on, and this machine's clock says {today}: set the clock")]
    Early {
        /// The secret file.
        path: PathBuf,
        /// When it begins.
        from: time::Date,
        /// What the clock says.
        today: time::Date,
    },
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Make(String),
}

/// A certificate for one host, with its key and the chain up to the root.
pub struct Leaf {
    /// Leaf and issuing authority.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Authority {
    /// Makes an authority for these hosts, in `folder`.
    ///
    /// # Errors
    /// If there is one already, or its file cannot be written.
    pub fn create(folder: &Path, hosts: &[Host]) -> Result<Self, CaError> {
        if hosts.is_empty() {
            return Err(CaError::NoHosts);
        }
        let path = folder.join(ISSUER_FILE);
        // Looked for first: somebody else who makes one now makes it last.
        let is_rooted = root_file(folder).try_exists().unwrap_or(true);
        if path.try_exists().unwrap_or(true) {
            return Err(CaError::Exists(folder.to_owned()));
        }
        if is_rooted {
            return Err(bereft(path));
        }
        let fault = |error| CaError::File { path: folder.to_owned(), error };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(fault)?;
        is_own(folder, &fs::metadata(folder).map_err(fault)?)?;

        let now = SystemTime::now();
        let (root, certificate, key) = certificates::authority(hosts, now)?;
        let text = pem::encode_many(&[
            pem::Pem::new("PRIVATE KEY", key.serialized_der()),
            pem::Pem::new("CERTIFICATE", certificate.to_vec()),
            pem::Pem::new("CERTIFICATE", root.to_vec()),
        ]);
        let text = Zeroizing::new(text);
        // Whole or not at all, readable for nobody else from its first byte on, and never over another:
        // two processes may begin at once.
        let written = tempfile::NamedTempFile::new_in(folder).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist_noclobber(&path).map(drop).map_err(|error| error.error)
        });
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(CaError::Exists(folder.to_owned()));
            }
            Err(error) => return Err(fault(error)),
        }
        let vanished = || CaError::Broken { path, why: "it vanished while it was made".into() };
        let authority = Self::load(folder, hosts)?.ok_or_else(vanished)?;
        publish(folder, &authority.root_pem());
        Ok(authority)
    }

    /// The authority in `folder`, proved to serve these hosts. `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read or used: expired, mismatched, constrained to other hosts, open to others.
    pub fn load(folder: &Path, hosts: &[Host]) -> Result<Option<Self>, CaError> {
        let path = folder.join(ISSUER_FILE);
        let fault = |error| CaError::File { path: path.clone(), error };
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Whoever trusts that root would not trust another.
                if root_file(folder).exists() {
                    return Err(bereft(path));
                }
                return Ok(None);
            }
            Err(error) => return Err(fault(error)),
        };
        if !metadata.is_file() {
            return Err(CaError::Broken { path, why: "it is no file".into() });
        }
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(CaError::Exposed { path, mode });
        }
        is_own(&path, &metadata)?;
        // Of a link, what it leads to.
        let real = fs::canonicalize(&path).map_err(fault)?;
        for folder in [Some(folder), real.parent()].into_iter().flatten() {
            is_own(folder, &fs::metadata(folder).map_err(fault)?)?;
        }
        let text = Zeroizing::new(fs::read(&path).map_err(fault)?);
        let broken = |why: String| CaError::Broken { path: path.clone(), why };
        let authority = Self::parse(&text).map_err(broken)?;
        let now = SystemTime::now();
        if now < authority.not_before {
            let date = |time: SystemTime| OffsetDateTime::from(time).date();
            let (from, today) = (date(authority.not_before), date(now));
            return Err(CaError::Early { path, from, today });
        }
        authority.prove(hosts).map_err(broken)?;
        Ok(Some(authority))
    }

    /// The authority in `folder`; made if there is none yet.
    ///
    /// # Errors
    /// Those of [`Authority::load`] and [`Authority::create`].
    pub fn open(folder: &Path, hosts: &[Host]) -> Result<Self, CaError> {
        let authority = match Self::load(folder, hosts)? {
            Some(authority) => authority,
            None => match Self::create(folder, hosts) {
                // Somebody else was faster.
                Err(CaError::Exists(_)) => {
                    Self::load(folder, hosts)?.ok_or(CaError::Exists(folder.to_owned()))?
                }
                made => made?,
            },
        };
        publish(folder, &authority.root_pem());
        Ok(authority)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let parts = pem::parse_many(text).map_err(|error| error.to_string())?;
        let [key, certificate, root] = <[pem::Pem; 3]>::try_from(parts)
            .map_err(|_| "it does not hold a key and two certificates")?;
        let tags = [&key, &certificate, &root].map(pem::Pem::tag);
        if tags != ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE"] {
            return Err("it does not hold a key and two certificates".into());
        }
        let key = Zeroizing::new(PrivateKeyDer::Pkcs8(key.into_contents().into()));
        let key = KeyPair::try_from(&*key).map_err(|error| format!("its key: {error}"))?;
        let certificate = CertificateDer::from(certificate.into_contents());
        let root = CertificateDer::from(root.into_contents());
        let (_, parsed) = X509Certificate::from_der(&certificate)
            .map_err(|error| format!("its certificate: {error}"))?;
        if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key) {
            return Err("its key and its certificate do not belong together".into());
        }
        let not_before = parsed.validity().not_before.to_datetime().into();
        let not_after = parsed.validity().not_after.to_datetime().into();
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(|error| error.to_string())?;
        Ok(Self { root, issuer, not_before, not_after, certificate })
    }

    /// Whether it is constrained to these hosts, and clients that trust the root would take its word for
    /// them.
    fn prove(&self, hosts: &[Host]) -> Result<(), String> {
        let now = SystemTime::now();
        if now > self.not_after {
            let end = OffsetDateTime::from(self.not_after).date();
            return Err(format!("the certificate authority has expired on {end}"));
        }
        let (mut permitted, mut named) = (self.hosts(), hosts.to_vec());
        permitted.sort();
        named.sort();
        named.dedup();
        if permitted != named {
            let list =
                |hosts: &[Host]| hosts.iter().map(Host::to_string).collect::<Vec<_>>().join(", ");
            let (permitted, named) = (list(&permitted), list(&named));
            return Err(format!(
                "it may sign for [{permitted}], but intercept.hosts names [{named}]"
            ));
        }
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).map_err(|error| format!("its root: {error}"))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|error| error.to_string())?;
        for host in hosts {
            let leaf = self.mint(host, now).map_err(|error| error.to_string())?;
            let name = ServerName::try_from(host).map_err(|error| error.to_string())?;
            verifier
                .verify_server_cert(&leaf.chain[0], &leaf.chain[1..], &name, &[], UnixTime::now())
                .map_err(|error| format!("clients would not take its word for {host} ({error})"))?;
        }
        Ok(())
    }

    /// The root's certificate: what clients trust.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The root's certificate as PEM.
    pub fn root_pem(&self) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE", self.root.to_vec()))
    }

    /// The issuing authority's certificate, which servers send.
    pub fn issuing(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The hosts that its constraint permits.
    pub fn hosts(&self) -> Vec<Host> {
        use x509_parser::extensions::GeneralName;
        let Ok((_, parsed)) = X509Certificate::from_der(&self.certificate) else {
            return Vec::new();
        };
        let Ok(Some(constraints)) = parsed.name_constraints() else { return Vec::new() };
        if !constraints.critical {
            return Vec::new();
        }
        let permitted = constraints.value.permitted_subtrees.iter().flatten();
        let host = |base: &GeneralName<'_>| match base {
            GeneralName::DNSName(name) => name.parse().ok(),
            // An address and its mask.
            GeneralName::IPAddress(bytes) => match bytes.len() {
                8 => <[u8; 4]>::try_from(&bytes[..4]).ok().map(|it| Host::Address(it.into())),
                32 => <[u8; 16]>::try_from(&bytes[..16]).ok().map(|it| Host::Address(it.into())),
                _ => None,
            },
            _ => None,
        };
        permitted.filter_map(|subtree| host(&subtree.base)).collect()
    }

    /// When it ends; nothing that it signs lives longer.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs a certificate for a host, valid from `now` (and two days before, for slow clocks) for a
    /// week.
    ///
    /// # Errors
    /// If the signature fails.
    pub fn mint(&self, host: &Host, now: SystemTime) -> Result<Leaf, CaError> {
        let not_after = (now + certificates::LEAF_LIFE).min(self.not_after);
        let (leaf, key) = certificates::leaf(host, &self.issuer, now, not_after)?;
        Ok(Leaf { chain: vec![leaf, self.certificate.clone()], key, not_after })
    }
}

/// Nobody else may change what is here: a key of theirs would be trusted by this user's programs.
fn is_own(path: &Path, metadata: &fs::Metadata) -> Result<(), CaError> {
    let untrusted = |why| CaError::Untrusted { path: path.to_owned(), why };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o022 != 0 {
        return Err(untrusted(format!("mode {mode:o}")));
    }
    let owner = metadata.uid();
    // Root may do anything anyway, and is who mounts secrets.
    if owner == 0 || owner == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    Err(untrusted(format!("owned by user {owner}")))
}

/// The issuer's file is missing, and its root is there.
fn bereft(path: PathBuf) -> CaError {
    CaError::Broken { path, why: format!("it is missing, though {ROOT_FILE} is there") }
}

/// Puts the root's certificate where people and programs find it, if that can be.
fn publish(folder: &Path, root: &str) {
    let path = folder.join(ROOT_FILE);
    if fs::read(&path).is_ok_and(|there| there == root.as_bytes()) {
        return;
    }
    if let Err(error) = write_public(&path, root.as_bytes()) {
        tracing::warn!(path = %path.display(), %error, "cannot write the root's certificate");
    }
}

/// Writes a file that everybody may read, whole or not at all.
pub(crate) fn write_public(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(content)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    file.persist(path)?;
    Ok(())
}

/// The file that clients have to trust, in the authority's folder.
pub fn root_file(folder: &Path) -> PathBuf {
    folder.join(ROOT_FILE)
}
