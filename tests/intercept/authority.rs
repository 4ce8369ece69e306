//! The certificate authority: its files, its limits, and what clients make of it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use optin_proxy::intercept::Host;
use optin_proxy::intercept::ca::{Authority, CaError};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

fn hosts(names: &[&str]) -> Vec<Host> {
    names.iter().map(|name| name.parse().expect("a host")).collect()
}

fn parsed<'c>(der: &'c CertificateDer<'static>) -> X509Certificate<'c> {
    X509Certificate::from_der(der).expect("a certificate").1
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

/// What `load` complains of.
fn complaint(folder: &Path, names: &[&str]) -> String {
    match Authority::load(folder, &hosts(names)) {
        Ok(_) => panic!("no complaint"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn its_key_is_for_its_owner_only_and_its_root_for_everybody() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("a/b");
    Authority::create(&folder, &hosts(&["api.example"])).expect("an authority");
    assert_eq!(mode(&folder), 0o700);
    assert_eq!(mode(&folder.join("issuer.pem")), 0o600);
    assert_eq!(mode(&folder.join("ca.pem")), 0o644);
    let public = std::fs::read_to_string(folder.join("ca.pem")).expect("text");
    assert!(!public.contains("KEY") && public.matches("BEGIN").count() == 1);
    let left: Vec<_> = std::fs::read_dir(&folder).expect("a folder").collect();
    assert_eq!(left.len(), 2, "no temporary file stays: {left:?}");
}

#[test]
fn it_is_never_overwritten_not_even_by_many_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = hosts(&["api.example"]);
    let made: Vec<_> = std::thread::scope(|scope| {
        let making: Vec<_> =
            (0..8).map(|_| scope.spawn(|| Authority::open(folder.path(), &names))).collect();
        making.into_iter().map(|it| it.join().expect("no panic").expect("an authority")).collect()
    });
    assert!(made.iter().all(|authority| authority.root() == made[0].root()));
    let before = std::fs::read(folder.path().join("issuer.pem")).expect("it is there");
    let again = Authority::create(folder.path(), &names).err().expect("refused");
    assert!(matches!(again, CaError::Exists(_)), "{again}");
    assert_eq!(std::fs::read(folder.path().join("issuer.pem")).expect("it is there"), before);
}

#[test]
fn the_constraint_stands_in_the_issuing_authority_and_permits_the_hosts_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::create(folder.path(), &hosts(&["api.example", "10.0.0.1"]));
    let authority = authority.expect("an authority");
    let (root, issuing) = (parsed(authority.root()), parsed(authority.issuing()));
    assert_eq!(
        root.basic_constraints().expect("one").expect("one").value.path_len_constraint,
        Some(1)
    );
    assert!(root.name_constraints().expect("readable").is_none(), "Java ignores it there");
    let basic = issuing.basic_constraints().expect("one").expect("one");
    assert!(basic.critical && basic.value.ca);
    assert_eq!(basic.value.path_len_constraint, Some(0));
    let constraints = issuing.name_constraints().expect("one").expect("one");
    assert!(constraints.critical);
    let permitted = constraints.value.permitted_subtrees.as_ref().expect("some");
    let permitted: Vec<_> = permitted.iter().map(|subtree| &subtree.base).collect();
    assert!(matches!(
        permitted[..],
        [GeneralName::DNSName("api.example"), GeneralName::IPAddress(_)]
    ));
    let excluded = constraints.value.excluded_subtrees.as_ref().expect("IPv6");
    assert!(matches!(excluded[0].base, GeneralName::IPAddress(bytes) if bytes == [0; 32]));
    for certificate in [&root, &issuing] {
        assert!(certificate.basic_constraints().expect("one").expect("one").critical);
        assert!(certificate.raw_serial().len() >= 8, "it cannot be guessed");
        let usage = certificate.key_usage().expect("one").expect("one");
        assert!(usage.critical);
        let usage = usage.value;
        assert!(usage.key_cert_sign() && usage.crl_sign() && !usage.digital_signature());
    }
    assert_eq!(authority.hosts(), hosts(&["api.example", "10.0.0.1"]));
}

#[test]
fn a_leaf_is_what_strict_clients_ask_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = hosts(&["api.example", "10.0.0.1"]);
    let authority = Authority::create(folder.path(), &names).expect("an authority");
    let now = SystemTime::now();
    let leaves: Vec<_> =
        names.iter().map(|host| authority.mint(host, now).expect("a leaf")).collect();
    let first = parsed(&leaves[0].chain[0]);
    assert_eq!(leaves[0].chain.len(), 2, "the issuing authority goes with it");
    let names = &first.subject_alternative_name().expect("one").expect("one").value.general_names;
    assert!(matches!(names[..], [GeneralName::DNSName("api.example")]));
    let second = parsed(&leaves[1].chain[0]);
    let names = &second.subject_alternative_name().expect("one").expect("one").value.general_names;
    assert!(matches!(names[..], [GeneralName::IPAddress(&[10, 0, 0, 1])]));
    assert_ne!(first.raw_serial(), second.raw_serial());
    assert!([&first, &second].iter().all(|leaf| leaf.raw_serial().len() >= 8));
    assert!(first.key_usage().expect("one").expect("one").critical);
    assert!(first.key_usage().expect("one").expect("one").value.digital_signature());
    assert!(first.extended_key_usage().expect("one").expect("one").value.server_auth);
    let has = |oid| first.extensions().iter().any(|extension| extension.oid == oid);
    assert!(has(x509_parser::oid_registry::OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER));
    let at = |time: SystemTime| x509_parser::time::ASN1Time::from(time::OffsetDateTime::from(time));
    let day = Duration::from_secs(86_400);
    assert!(first.validity().is_valid_at(at(now - day)), "a slow clock");
    assert!(first.validity().is_valid_at(at(now + 6 * day)));
    assert!(!first.validity().is_valid_at(at(now + 8 * day)), "a short life");
}

#[test]
fn a_name_that_is_too_long_for_a_common_name_gets_its_certificate_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let long = format!("{}.{}.example", "a".repeat(60), "b".repeat(60));
    Authority::create(folder.path(), &hosts(&[&long])).expect("it proves itself");
}

#[test]
fn what_cannot_be_used_says_why_and_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let (folder, path) = (folder.path(), folder.path().join("issuer.pem"));
    assert!(Authority::load(folder, &hosts(&["api.example"])).expect("readable").is_none());
    Authority::create(folder, &hosts(&["api.example"])).expect("an authority");
    let good = std::fs::read_to_string(&path).expect("text");

    for (named, list) in [
        (&["api.example", "other.example"][..], "[api.example, other.example]"),
        (&["other.example"], "[other.example]"),
    ] {
        let said = complaint(folder, named);
        let why = format!("it may sign for [api.example], but intercept.hosts names {list}");
        assert!(said.contains(&why) && said.contains("run `optin-proxy ca init`"), "{said}");
    }

    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).expect("ours");
    let said = complaint(folder, &["api.example"]);
    assert!(
        said.contains("other users may read this key (mode 640)") && said.contains("chmod 600")
    );
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("ours");

    for (changed, mode, right) in [(folder, 0o777, 0o700), (folder, 0o720, 0o700)] {
        std::fs::set_permissions(changed, PermissionsExt::from_mode(mode)).expect("ours");
        let said = complaint(folder, &["api.example"]);
        assert!(said.contains("other users may change what is here"), "{said}");
        std::fs::set_permissions(changed, PermissionsExt::from_mode(right)).expect("ours");
    }

    // Nor where a link leads to.
    let open = tempfile::tempdir().expect("a folder");
    let elsewhere = open.path().join("issuer.pem");
    std::fs::rename(&path, &elsewhere).expect("ours");
    std::os::unix::fs::symlink(&elsewhere, &path).expect("ours");
    assert!(Authority::load(folder, &hosts(&["api.example"])).is_ok_and(|it| it.is_some()));
    std::fs::set_permissions(open.path(), PermissionsExt::from_mode(0o777)).expect("ours");
    let said = complaint(folder, &["api.example"]);
    assert!(said.contains("other users may change what is here"), "{said}");
    std::fs::rename(&elsewhere, &path).expect("ours");

    let other = tempfile::tempdir().expect("a folder");
    Authority::create(other.path(), &hosts(&["api.example"])).expect("an authority");
    let other = std::fs::read_to_string(other.path().join("issuer.pem")).expect("text");
    let blocks = |text: &str| -> Vec<String> {
        text.split_inclusive("-----END ").map(str::to_owned).collect()
    };
    let (ours, theirs) = (blocks(&good), blocks(&other));
    let mixed = [&theirs[..1], &ours[1..]].concat().concat();
    for (text, why) in [
        (mixed.as_str(), "its key and its certificate do not belong together"),
        ("", "it does not hold a key and two certificates"),
        (&good[..good.len() / 2], "it does not hold a key and two certificates"),
        (&good.replace("MII", "AAA"), ""),
    ] {
        std::fs::write(&path, text).expect("ours");
        let said = complaint(folder, &["api.example"]);
        assert!(said.contains(why) && said.contains("ca init"), "{said}");
        assert!(!said.contains("PRIVATE"), "{said}");
    }
}

#[test]
fn one_without_a_constraint_is_not_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = |issuer: Option<&Issuer<'_, KeyPair>>, key: &KeyPair| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        let certificate = match issuer {
            None => params.self_signed(key),
            Some(issuer) => params.signed_by(key, issuer),
        };
        (certificate.expect("a certificate").pem(), params)
    };
    let (root_key, key) =
        (KeyPair::generate().expect("a key"), KeyPair::generate().expect("a key"));
    let (root, params) = authority(None, &root_key);
    let (issuing, _) = authority(Some(&Issuer::new(params, root_key)), &key);
    let path = folder.path().join("issuer.pem");
    std::fs::write(&path, [key.serialize_pem(), issuing, root].concat()).expect("ours");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("ours");
    let said = complaint(folder.path(), &["api.example"]);
    assert!(said.contains("it may sign for []"), "{said}");
}

#[test]
fn none_is_made_where_a_root_is_trusted_whose_key_is_missing() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = hosts(&["api.example"]);
    Authority::create(folder.path(), &names).expect("an authority");
    let root = std::fs::read(folder.path().join("ca.pem")).expect("it is there");
    std::fs::remove_file(folder.path().join("issuer.pem")).expect("ours");
    // Regression: `ca init` made one, and overwrote the root.
    for made in [Authority::open, Authority::create] {
        let refused = made(folder.path(), &names).err().expect("refused").to_string();
        assert!(refused.contains("it is missing, though ca.pem is there"), "{refused}");
        assert_eq!(std::fs::read(folder.path().join("ca.pem")).expect("it is there"), root);
    }
}

#[test]
fn none_is_made_for_no_host() {
    let folder = tempfile::tempdir().expect("a folder");
    let refused = Authority::create(folder.path(), &[]).err().expect("refused");
    assert!(refused.to_string().contains("intercept.hosts is empty"));
}

#[test]
fn one_that_has_ended_says_when() {
    let folder = tempfile::tempdir().expect("a folder");
    let ended = |key: &KeyPair, issuer: Option<&Issuer<'_, KeyPair>>| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.not_after = rcgen::date_time_ymd(2020, 2, 3);
        let certificate = match issuer {
            None => params.self_signed(key),
            Some(issuer) => params.signed_by(key, issuer),
        };
        (certificate.expect("a certificate"), params)
    };
    let (root_key, key) =
        (KeyPair::generate().expect("a key"), KeyPair::generate().expect("a key"));
    let (root, params) = ended(&root_key, None);
    let (issuing, _) = ended(&key, Some(&Issuer::new(params, root_key)));
    let path = folder.path().join("issuer.pem");
    let text = [key.serialize_pem(), issuing.pem(), root.pem()].concat();
    std::fs::write(&path, text).expect("ours");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("ours");
    let said = complaint(folder.path(), &["api.example"]);
    assert!(said.contains("the certificate authority has expired on 2020-02-03"), "{said}");
}

#[test]
fn a_key_of_somebody_elses_is_not_used() {
    let folder = tempfile::tempdir().expect("a folder");
    Authority::create(folder.path(), &hosts(&["api.example"])).expect("an authority");
    let key = folder.path().join("issuer.pem");
    // Only root can give a file away.
    if std::os::unix::fs::chown(&key, Some(12345), None).is_ok() {
        let complaint = complaint(folder.path(), &["api.example"]);
        assert!(complaint.contains("issuer.pem"), "{complaint}");
    }
}
