//! Why a connection to, or from, another agent did not come about.

use std::{fmt, io};

use rustls::Error as TlsError;

/// Why a handshake between agents failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandshakeFailure {
    /// The peer's certificate is missing, expired, malformed or of nobody we trust.
    Certificate,
    /// The connection broke off.
    Closed,
    /// The peer's certificate is good, but not that of the pod it should be.
    Identity,
    /// The pod has no valid certificate of its own to show.
    NoCertificate,
    /// The peer has too many handshakes unfinished.
    Overloaded,
    /// The peer spoke no TLS 1.3, or no protocol of ours.
    Protocol,
    /// The peer refused our certificate.
    Refused,
    /// It took longer than `timeouts.handshake`.
    Timeout,
    /// The peer's machine could not be reached.
    Unreachable,
}

impl HandshakeFailure {
    /// Every reason, in the order of [`Self::index`].
    pub const ALL: [Self; 9] = [
        Self::Certificate,
        Self::Closed,
        Self::Identity,
        Self::NoCertificate,
        Self::Overloaded,
        Self::Protocol,
        Self::Refused,
        Self::Timeout,
        Self::Unreachable,
    ];

    /// The place in [`Self::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The name in metrics and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Closed => "closed",
            Self::Identity => "identity",
            Self::NoCertificate => "no-certificate",
            Self::Overloaded => "overloaded",
            Self::Protocol => "protocol",
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Unreachable => "unreachable",
        }
    }

    /// What an error of the TLS stream means.
    pub fn of(error: &io::Error) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>());
        match tls {
            Some(TlsError::InvalidCertificate(_) | TlsError::NoCertificatesPresented) => {
                Self::Certificate
            }
            Some(TlsError::AlertReceived(_)) => Self::Refused,
            Some(_) => Self::Protocol,
            None if error.kind() == io::ErrorKind::TimedOut => Self::Timeout,
            None => Self::Closed,
        }
    }
}

impl fmt::Display for HandshakeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Certificate => "the peer's certificate is missing, expired or not trusted",
            Self::Closed => "the peer broke the handshake off",
            Self::Identity => "the peer is not the pod that the registry names for its address",
            Self::NoCertificate => "the pod has no valid certificate",
            Self::Overloaded => "the peer has too many handshakes unfinished",
            Self::Protocol => "the peer does not speak TLS 1.3 of the mesh",
            Self::Refused => "the peer refused the handshake",
            Self::Timeout => "the handshake took too long",
            Self::Unreachable => "the peer cannot be reached",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_errors_are_told_apart() {
        let wrapped = |error: TlsError| io::Error::new(io::ErrorKind::InvalidData, error);
        for (error, expected) in [
            (
                wrapped(TlsError::InvalidCertificate(rustls::CertificateError::Expired)),
                HandshakeFailure::Certificate,
            ),
            (wrapped(TlsError::NoCertificatesPresented), HandshakeFailure::Certificate),
            (
                wrapped(TlsError::AlertReceived(rustls::AlertDescription::CertificateExpired)),
                HandshakeFailure::Refused,
            ),
            (wrapped(TlsError::NoApplicationProtocol), HandshakeFailure::Protocol),
            (io::ErrorKind::TimedOut.into(), HandshakeFailure::Timeout),
            (io::ErrorKind::UnexpectedEof.into(), HandshakeFailure::Closed),
        ] {
            assert_eq!(HandshakeFailure::of(&error), expected, "{error}");
        }
    }

    #[test]
    fn reasons_are_numbered() {
        for (index, reason) in HandshakeFailure::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), index);
        }
    }
}
