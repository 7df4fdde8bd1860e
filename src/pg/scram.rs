//! SCRAM-SHA-256 (RFC 5802, RFC 7677) as far as the proxy has a part in it: it sees the login of its client at the leader, and from that,
//! together with the verifier that the leader has stored, gets the ClientKey. With it the proxy can log in as that client once more, at a
//! server with the same verifier, and nowhere else; the password stays unknown. The key is kept in memory only.
//!
//! Pure: messages go in, messages come out.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::{digest, hmac};
use zeroize::Zeroizing;

/// The mechanism, as PostgreSQL names it.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// What the client says about channel binding: it does none. The leader's end is a unix socket, which offers none.
const GS2_HEADER: &str = "n,,";
const KEY_BYTES: usize = 32;
/// Longest message of the exchange that is looked at.
const MESSAGE_BYTES_MAX: usize = 4096;

/// What proves the knowledge of a password to a server with its verifier.
pub struct ClientKey(Zeroizing<[u8; KEY_BYTES]>);

impl std::fmt::Debug for ClientKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientKey(..)")
    }
}

/// A login that passes by.
#[derive(Debug, Default)]
pub struct Observed {
    client_first_bare: Option<String>,
    server_first: Option<String>,
    /// Without the proof, and the proof.
    client_final: Option<(String, Zeroizing<Vec<u8>>)>,
}

impl Observed {
    /// The body of a message of type `p`: `SASLInitialResponse`, then `SASLResponse`. What is neither is none of SCRAM's.
    pub fn client(&mut self, body: &[u8]) {
        if body.len() > MESSAGE_BYTES_MAX {
            return;
        }
        if self.client_first_bare.is_none() {
            self.client_first_bare = client_first_bare(body);
        } else if self.server_first.is_some() && self.client_final.is_none() {
            self.client_final = client_final(body);
        }
    }

    /// The body of an authentication message: `AuthenticationSASLContinue` is the one that matters.
    pub fn server(&mut self, body: &[u8]) {
        if let Some(data) = continued(body).filter(|data| data.len() <= MESSAGE_BYTES_MAX) {
            self.server_first = Some(data.to_owned());
        }
    }

    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.client_final.is_some()
    }

    /// The key, by the verifier of the role that has logged in (`pg_authid.rolpassword`). `None`: it was no such login.
    #[must_use]
    pub fn client_key(&self, verifier: &str) -> Option<ClientKey> {
        let (without_proof, proof) = self.client_final.as_ref()?;
        let auth_message = [self.client_first_bare.as_deref()?, self.server_first.as_deref()?, without_proof].join(",");
        let mut parts = verifier.strip_prefix(MECHANISM)?.strip_prefix('$')?.split('$');
        let keys = parts.nth(1)?;
        let stored = BASE64.decode(keys.split_once(':')?.0).ok()?;
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &stored), auth_message.as_bytes());
        let key = exclusive_or(proof, signature.as_ref())?;
        (digest::digest(&digest::SHA256, &*key).as_ref() == stored).then_some(ClientKey(key))
    }
}

/// A login of the proxy's own, as the client that the key is from.
pub struct Login<'k> {
    key: &'k ClientKey,
    nonce: String,
}

impl<'k> Login<'k> {
    /// `random`: never used twice.
    #[must_use]
    pub fn new(key: &'k ClientKey, random: [u8; 18]) -> Self {
        Self { key, nonce: BASE64.encode(random) }
    }

    fn first_bare(&self) -> String {
        // PostgreSQL takes the name from the startup packet.
        format!("n=,r={}", self.nonce)
    }

    /// The client's first message.
    #[must_use]
    pub fn first(&self) -> String {
        format!("{GS2_HEADER}{}", self.first_bare())
    }

    /// The client's last message, after the body of `AuthenticationSASLContinue`. `None`: the server did not answer our message.
    #[must_use]
    pub fn last(&self, body: &[u8]) -> Option<String> {
        let server_first = continued(body)?;
        let nonce = server_first.split(',').next()?.strip_prefix("r=")?;
        if !nonce.starts_with(&self.nonce) {
            return None;
        }
        let without_proof = format!("c={},r={nonce}", BASE64.encode(GS2_HEADER));
        let auth_message = [self.first_bare().as_str(), server_first, &without_proof].join(",");
        let stored = digest::digest(&digest::SHA256, &*self.key.0);
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, stored.as_ref()), auth_message.as_bytes());
        let proof = exclusive_or(&*self.key.0, signature.as_ref())?;
        Some(format!("{without_proof},p={}", BASE64.encode(*proof)))
    }
}

fn exclusive_or(one: &[u8], other: &[u8]) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    if one.len() != KEY_BYTES || other.len() != KEY_BYTES {
        return None;
    }
    let mut result = Zeroizing::new([0; KEY_BYTES]);
    for (to, (a, b)) in result.iter_mut().zip(one.iter().zip(other)) {
        *to = a ^ b;
    }
    Some(result)
}

/// The text of `AuthenticationSASLContinue`.
fn continued(body: &[u8]) -> Option<&str> {
    let (code, data) = body.split_first_chunk::<4>()?;
    (u32::from_be_bytes(*code) == 11).then(|| std::str::from_utf8(data).ok())?
}

/// `SASLInitialResponse`: mechanism, length, `gs2-header client-first-message-bare`.
fn client_first_bare(body: &[u8]) -> Option<String> {
    let rest = body.strip_prefix(MECHANISM.as_bytes())?.strip_prefix(b"\0")?;
    let (_, data) = rest.split_first_chunk::<4>()?;
    let text = std::str::from_utf8(data).ok()?;
    // Without channel binding: "n,," or "y,,", and no other name.
    let bare = text.strip_prefix("n,,").or_else(|| text.strip_prefix("y,,"))?;
    Some(bare.to_owned())
}

fn client_final(body: &[u8]) -> Option<(String, Zeroizing<Vec<u8>>)> {
    let (without_proof, proof) = std::str::from_utf8(body).ok()?.rsplit_once(",p=")?;
    Some((without_proof.to_owned(), Zeroizing::new(BASE64.decode(proof).ok()?)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sasl_continue(text: &str) -> Vec<u8> {
        [&11_u32.to_be_bytes()[..], text.as_bytes()].concat()
    }

    fn initial(text: &str) -> Vec<u8> {
        let length = u32::try_from(text.len()).unwrap().to_be_bytes();
        [MECHANISM.as_bytes(), b"\0", &length, text.as_bytes()].concat()
    }

    /// The exchange of RFC 7677, section 3: user "user", password "pencil".
    const CLIENT_FIRST: &str = "n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    const SERVER_FIRST: &str = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    const CLIENT_FINAL: &str = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                                p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    /// As PostgreSQL stores that password with that salt.
    const VERIFIER: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==\
                            $WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

    fn observed() -> Observed {
        let mut observed = Observed::default();
        observed.client(&initial(CLIENT_FIRST));
        observed.server(&sasl_continue(SERVER_FIRST));
        observed.client(CLIENT_FINAL.as_bytes());
        observed
    }

    #[test]
    fn the_key_of_a_login_proves_the_same_at_another_server() {
        let key = observed().client_key(VERIFIER).expect("the exchange of the RFC");
        let login = Login::new(&key, [7; 18]);
        let first = login.first();
        let nonce = first.strip_prefix("n,,n=,r=").expect("a nonce");
        let answer = sasl_continue(&format!("r={nonce}more,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"));
        let last = login.last(&answer).expect("the last message");
        // The server finds the same key in it.
        let mut seen = Observed::default();
        seen.client(&initial(&first));
        seen.server(&answer);
        seen.client(last.as_bytes());
        assert!(seen.client_key(VERIFIER).is_some());
        assert!(login.last(&sasl_continue("r=another,s=AAAA,i=4096")).is_none(), "not an answer to our nonce");
    }

    #[test]
    fn what_is_no_such_login_gives_no_key() {
        let other = VERIFIER.replace("WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=", &BASE64.encode([1; 32]));
        assert!(observed().client_key(&other).is_none());
        assert!(observed().client_key("md5a5a5").is_none() && observed().client_key("").is_none());
        let mut password = Observed::default();
        password.client(b"secret\0");
        password.client(b"secret\0");
        assert!(!password.is_whole());
        assert_eq!(format!("{:?}", observed().client_key(VERIFIER)), "Some(ClientKey(..))");
    }

    proptest! {
        #[test]
        fn random_messages_never_panic(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..6),
                                       verifier in ".{0,80}") {
            let mut observed = Observed::default();
            for message in &messages {
                observed.client(message);
                observed.server(message);
            }
            let _ = observed.client_key(&verifier);
        }
    }
}
