//! The roots that the mesh trusts: the CA's own, and those that the operator adds while one root
//! follows another.

use mesh_common::{spiffe::TrustDomain, svid::TrustBundle};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use crate::{files::Source, registry::Problem};

/// Puts the CA's own roots and the operator's PEM files together. A file with anything wrong in it
/// is left out whole; the CA's own roots are always there.
pub fn assemble(
    trust_domain: &TrustDomain,
    own_roots: &[CertificateDer<'static>],
    mut sources: Vec<Source>,
) -> (TrustBundle, Vec<Problem>) {
    let mut bundle = TrustBundle { trust_domain: trust_domain.clone(), roots: own_roots.to_vec() };
    let mut problems = Vec::new();
    sources.sort_by(|a, b| a.file.cmp(&b.file));
    for Source { file, content, .. } in sources {
        let mut next = bundle.clone();
        let added = content.and_then(|pem| certificates(&pem)).and_then(|found| {
            next.roots.extend(found.into_iter().filter(|root| !bundle.roots.contains(root)));
            next.check().map_err(|error| error.to_string())
        });
        match added {
            Ok(()) => bundle = next,
            Err(reason) => problems.push(Problem { file, reason }),
        }
    }
    (bundle, problems)
}

/// The certificates in a PEM text, at least one.
///
/// # Errors
///
/// What is wrong with the text.
pub fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| format!("not PEM: {error}"))?;
    if found.is_empty() {
        return Err("there is no certificate in it (-----BEGIN CERTIFICATE-----)".to_owned());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn root() -> rcgen::Certificate {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap()
    }

    fn source(file: &str, content: String) -> Source {
        Source { file: file.to_owned(), modified: SystemTime::UNIX_EPOCH, content: Ok(content) }
    }

    #[test]
    fn roots_add_up_and_bad_files_do_not_disturb() {
        let (own, a, b) = (root(), root(), root());
        let leaf = CertificateParams::default().self_signed(&KeyPair::generate().unwrap()).unwrap();
        let sources = vec![
            source("a.pem", a.pem() + &own.pem()),
            source("empty.pem", String::new()),
            source("half.pem", b.pem() + &leaf.pem()),
            source("text.pem", "-----BEGIN CERTIFICATE-----\n!\n".to_owned()),
        ];
        let td = "mesh.example".parse().unwrap();
        let (bundle, problems) = assemble(&td, &[own.der().clone()], sources);
        assert_eq!(bundle.roots, [own.der().clone(), a.der().clone()]);
        let files: Vec<_> = problems.iter().map(|problem| problem.file.as_str()).collect();
        assert_eq!(files, ["empty.pem", "half.pem", "text.pem"]);
    }
}
