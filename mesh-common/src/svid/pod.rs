//! The private extension that ties a workload's certificate to one pod.

use x509_parser::{
    asn1_rs::{FromDer as _, Oid, Sequence, ToDer as _, Utf8String},
    certificate::X509Certificate,
};

use super::SvidError;
use crate::spiffe::check_segment;

/// The extension's object identifier, from the arc that needs no registration (ITU-T X.667).
///
/// Random, and in arcs below 2^31: Go's parser refuses a whole certificate for a larger one, as
/// the 128 bits of a UUID in a single arc would be. See `docs/identity.md`.
pub const POD_EXTENSION_OID: &[u64] = &[2, 25, 1_677_261_501, 1_893_937_710, 1];

/// One incarnation of a pod. Two pods of one service account have one name in SPIFFE's terms;
/// this tells them apart.
///
/// ```asn1
/// PodRef ::= SEQUENCE { name UTF8String, uid UTF8String }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// The pod's name in its namespace.
    pub name: String,
    /// Never used twice, in Kubernetes a UUID.
    pub uid: String,
}

impl PodRef {
    /// The value of the extension, in DER.
    pub fn encode(&self) -> Vec<u8> {
        [&self.name, &self.uid]
            .map(|text| Utf8String::new(text))
            .iter()
            .try_fold(Vec::new(), |mut fields, text| {
                text.write_der(&mut fields)?;
                Ok(fields)
            })
            .and_then(|fields| Sequence::new(fields.into()).to_der_vec())
            .unwrap_or_else(|error: x509_parser::asn1_rs::SerializeError| {
                unreachable!("writing to memory: {error}")
            })
    }

    /// Reads the value of the extension: this DER and no other, both fields fit to stand in a path.
    ///
    /// # Errors
    ///
    /// [`SvidError::Pod`].
    pub fn decode(der: &[u8]) -> Result<Self, SvidError> {
        let malformed = |error: &dyn ToString| SvidError::Pod(error.to_string());
        let (_, fields) = Sequence::from_der(der).map_err(|error| malformed(&error))?;
        let (rest, name) = Utf8String::from_der(&fields.content).map_err(|e| malformed(&e))?;
        let (_, uid) = Utf8String::from_der(rest).map_err(|error| malformed(&error))?;
        let pod = Self { name: name.string(), uid: uid.string() };
        for text in [&pod.name, &pod.uid] {
            check_segment(text).map_err(|error| malformed(&error))?;
        }
        // One value has one encoding, so this also refuses whatever was left over above.
        if pod.encode() == der { Ok(pod) } else { Err(malformed(&"not DER, or trailing bytes")) }
    }
}

/// The pod extension of a certificate, if it has one.
pub(super) fn find(x509: &X509Certificate<'_>) -> Result<Option<PodRef>, SvidError> {
    let oid = Oid::from(POD_EXTENSION_OID)
        .map_err(|_| SvidError::Malformed("the pod extension's OID".to_owned()))?;
    x509.get_extension_unique(&oid)
        .map_err(|error| SvidError::Malformed(error.to_string()))?
        .map(|extension| PodRef::decode(extension.value))
        .transpose()
}
