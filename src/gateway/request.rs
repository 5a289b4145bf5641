//! Parses the request that a proxy describes: target, credential and client address. Headers are bytes that an attacker
//! chooses, in any number; nothing here prints them.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, SocketAddr},
    str,
};

use super::settings::GatewaySettings;
use crate::{
    domain::header_name,
    trace::{RemoteTraceContext, RequestId},
};

/// The protocol by which a proxy calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProxyProtocol {
    ExtAuthz,
    ForwardAuth,
}

/// What is known of where the request came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientSource {
    /// The address that connected to the proxy which asks, as far as it is one; `x-forwarded-for` may end in it.
    Peer(Option<IpAddr>),
    /// `x-forwarded-for` ends in that address.
    LastForwarded,
}

/// The request that a proxy describes, in raw bytes.
#[derive(Clone)]
pub(crate) struct ProxyRequest<'a> {
    /// The protocol by which a proxy calls.
    pub(crate) protocol: ProxyProtocol,
    /// Whether the proxy removes the headers that the reply names. If not, its configuration lists them, by name.
    pub(crate) proxy_removes_headers: bool,
    pub(crate) method: &'a [u8],
    pub(crate) host: &'a [u8],
    pub(crate) target: &'a [u8],
    /// Names in lower case, and values; repeated ones apart, or joined by commas.
    pub(crate) headers: Vec<(&'a [u8], &'a [u8])>,
    pub(crate) client_source: ClientSource,
    /// The proxy's number for it, the same when it asks again; empty = none.
    pub(crate) proxy_request_id: &'a [u8],
}

impl fmt::Debug for ProxyRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProxyRequest").field("via", &self.protocol).finish_non_exhaustive()
    }
}

/// The credential that a request carries.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum RequestCredential<'a> {
    None,
    /// Several that differ, or one header several times.
    Multiple,
    Single {
        token: Cow<'a, str>,
        /// The headers that it stood in.
        headers: Vec<Box<str>>,
        /// Whether it stood in the query.
        in_query: bool,
    },
}

impl<'a> ProxyRequest<'a> {
    pub(super) fn method(&self) -> Option<&'a str> {
        str::from_utf8(self.method).ok().filter(|method| !method.is_empty())
    }

    pub(super) fn host(&self) -> Option<&'a str> {
        str::from_utf8(self.host).ok()
    }

    pub(super) fn target(&self) -> Option<&'a str> {
        str::from_utf8(self.target).ok()
    }

    /// The path without the query; [`super::LoggedPath`] makes it fit for logs.
    pub(super) fn path(&self) -> Cow<'a, str> {
        let path = self.target.split(|byte| *byte == b'?').next().unwrap_or_default();
        String::from_utf8_lossy(path)
    }

    /// What to call the request in logs: as it is called where it came from, or by the proxy's number.
    #[must_use]
    pub(crate) fn request_id(&self) -> Option<RequestId> {
        RequestId::from_bytes(self.header_values("x-request-id").next().unwrap_or(self.proxy_request_id))
    }

    /// The trace that the request is part of.
    #[must_use]
    pub(crate) fn trace_context(&self) -> Option<RemoteTraceContext> {
        let mut parents = self.header_values("traceparent");
        let parent = RemoteTraceContext::parse(parents.next()?, self.header_values("tracestate").next());
        parent.filter(|_| parents.next().is_none())
    }

    /// The proxy's number for it, if that is a well-formed one.
    pub(super) fn valid_proxy_request_id(&self) -> Option<&'a str> {
        RequestId::from_bytes(self.proxy_request_id)?;
        str::from_utf8(self.proxy_request_id).ok()
    }

    /// Whether it is a gRPC call.
    pub(super) fn is_grpc_call(&self) -> bool {
        self.header_values("content-type").next().is_some_and(|value| {
            // Not grpc-web, which reads HTTP's answers.
            let rest = value.strip_prefix(b"application/grpc");
            rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
        })
    }

    fn header_values(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.headers
            .iter()
            .filter(move |(known, _)| known.eq_ignore_ascii_case(name.as_bytes()))
            .map(|(_, value)| *value)
    }

    /// A header that may be given once; empty is as none.
    ///
    /// # Errors
    /// When it is given several times, or is other than visible ASCII.
    pub(super) fn single_header(&self, name: &str) -> Result<Option<&'a str>, ()> {
        let mut values = self.header_values(name);
        let Some(value) = values.next() else { return Ok(None) };
        let text = str::from_utf8(value).map_err(|_| ())?.trim_matches([' ', '\t']);
        let once = values.next().is_none() && !text.contains(',');
        let visible = text.bytes().all(|byte| (0x20..=0x7e).contains(&byte));
        if once && visible { Ok(Some(text).filter(|text| !text.is_empty())) } else { Err(()) }
    }

    /// What the request shows, in the places where it may.
    pub(super) fn find_credential(&self, settings: &GatewaySettings) -> RequestCredential<'a> {
        let mut found = RequestCredential::None;
        for name in &settings.credential_headers {
            let shown = match &**name {
                "authorization" => bearer_token(self.header_values(name)),
                _ => bare_token(self.header_values(name)),
            };
            found = found.combine(shown.map(|token| (token, Some(&**name))));
        }
        if let Some(name) = &settings.credential_query {
            found = found.combine(self.query_credential(name).map(|token| (token, None)));
        }
        found
    }

    /// Every text that may be a credential, in each place that is read and in each spelling of the place, however many
    /// there are: what logs must not show.
    pub(super) fn possible_credentials(&self, settings: &GatewaySettings) -> Vec<String> {
        let reads = |name: &[u8]| {
            settings.credential_headers.iter().any(|known| header_name::is_equivalent(name, known.as_bytes()))
        };
        let mut secrets = Vec::new();
        for (_, value) in self.headers.iter().filter(|(name, _)| reads(name)) {
            for part in String::from_utf8_lossy(value).split(',') {
                let part = part.trim_matches([' ', '\t']);
                secrets.push(strip_bearer_scheme(part).unwrap_or(part).to_owned());
            }
        }
        if let Some(known) = &settings.credential_query {
            let query = self.target.splitn(2, |byte| *byte == b'?').nth(1).unwrap_or_default();
            secrets.extend(
                parse_form(query).filter(|(name, _)| *name == **known).map(|(_, value)| value.into_owned()),
            );
        }
        secrets
    }

    /// Finds a query parameter by its raw name, because proxies remove it by that name. A percent-encoded name does not
    /// match.
    fn query_credential(&self, name: &str) -> CredentialOccurrence<Cow<'a, str>> {
        let query = self.target.splitn(2, |byte| *byte == b'?').nth(1).unwrap_or_default();
        let plain = |pair: &&[u8]| pair.split(|byte| *byte == b'=').next() == Some(name.as_bytes());
        let plain = query.split(|byte| *byte == b'&').filter(plain).count();
        let mut values = parse_form(query).filter(|(known, _)| known == name).map(|(_, value)| value);
        match (values.next(), values.next(), plain) {
            (None, _, _) => CredentialOccurrence::Absent,
            (Some(token), None, 1) => CredentialOccurrence::Single(token),
            _ => CredentialOccurrence::Multiple,
        }
    }

    /// The end client's address, behind `hops` proxies. `None` = unknown, so that a key with allowed networks is
    /// denied.
    pub(super) fn client_ip(&self, hops: usize) -> Option<IpAddr> {
        let mut forwarded: Vec<&[u8]> = self
            .header_values("x-forwarded-for")
            .flat_map(|value| value.split(|byte| *byte == b','))
            .collect();
        let peer = match self.client_source {
            ClientSource::Peer(peer) => {
                // Envoy appends the peer's address if it is configured to.
                if peer.is_some() && forwarded.last().is_some_and(|last| parse_ip(last) == peer) {
                    forwarded.pop();
                }
                peer
            }
            ClientSource::LastForwarded => forwarded.pop().and_then(parse_ip),
        };
        match hops {
            0 => peer,
            hops => forwarded.len().checked_sub(hops).and_then(|at| parse_ip(forwarded[at])),
        }
    }
}

/// `name=value&…` as forms and queries write it (`application/x-www-form-urlencoded`).
pub(crate) fn parse_form(text: &[u8]) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    let decode = |part: &[u8]| -> String {
        let spaced: Vec<u8> = part.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
        percent_encoding::percent_decode(&spaced).decode_utf8_lossy().into_owned()
    };
    text.split(|byte| *byte == b'&').filter(|pair| !pair.is_empty()).map(move |pair| {
        let (name, value) = match pair.iter().position(|byte| *byte == b'=') {
            Some(at) => (&pair[..at], &pair[at + 1..]),
            None => (pair, &b""[..]),
        };
        (Cow::Owned(decode(name)), Cow::Owned(decode(value)))
    })
}

/// The credentials found at one place of a request.
enum CredentialOccurrence<T> {
    Absent,
    Multiple,
    Single(T),
}

impl<T> CredentialOccurrence<T> {
    fn map<U>(self, with: impl FnOnce(T) -> U) -> CredentialOccurrence<U> {
        match self {
            CredentialOccurrence::Absent => CredentialOccurrence::Absent,
            CredentialOccurrence::Multiple => CredentialOccurrence::Multiple,
            CredentialOccurrence::Single(value) => CredentialOccurrence::Single(with(value)),
        }
    }
}

impl<'a> RequestCredential<'a> {
    /// What two places show together: the same token twice is one.
    fn combine(self, shown: CredentialOccurrence<(Cow<'a, str>, Option<&str>)>) -> RequestCredential<'a> {
        let (shown, header) = match shown {
            CredentialOccurrence::Absent => return self,
            CredentialOccurrence::Multiple => return RequestCredential::Multiple,
            CredentialOccurrence::Single(one) => one,
        };
        match self {
            RequestCredential::None => RequestCredential::Single {
                token: shown,
                headers: header.into_iter().map(Box::from).collect(),
                in_query: header.is_none(),
            },
            RequestCredential::Single { token, mut headers, in_query: query } if token == shown => {
                headers.extend(header.map(Box::from));
                RequestCredential::Single { token, headers, in_query: query || header.is_none() }
            }
            RequestCredential::Single { .. } | RequestCredential::Multiple => RequestCredential::Multiple,
        }
    }
}

/// Parses `Bearer <token>` with the scheme in any case (RFC 6750, section 2.1). Another scheme carries no credential of
/// Keyward.
fn bearer_token<'a>(values: impl Iterator<Item = &'a [u8]>) -> CredentialOccurrence<Cow<'a, str>> {
    let mut found = CredentialOccurrence::Absent;
    for value in values {
        let text = String::from_utf8_lossy(value);
        let parts: Vec<_> = text.split(',').map(|part| part.trim_matches([' ', '\t'])).collect();
        if !parts.iter().any(|part| strip_bearer_scheme(part).is_some()) {
            continue;
        }
        if parts.len() > 1 || !matches!(found, CredentialOccurrence::Absent) {
            return CredentialOccurrence::Multiple;
        }
        found = CredentialOccurrence::Single(Cow::Owned(
            strip_bearer_scheme(parts[0]).unwrap_or_default().to_owned(),
        ));
    }
    found
}

fn strip_bearer_scheme(text: &str) -> Option<&str> {
    if text.eq_ignore_ascii_case("bearer") {
        return Some("");
    }
    let (scheme, token) = text.split_once([' ', '\t'])?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_matches([' ', '\t']))
}

fn bare_token<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> CredentialOccurrence<Cow<'a, str>> {
    let Some(value) = values.next() else { return CredentialOccurrence::Absent };
    let text = String::from_utf8_lossy(value);
    let text = text.trim_matches([' ', '\t']);
    if values.next().is_some() || text.contains(',') {
        return CredentialOccurrence::Multiple;
    }
    if text.is_empty() {
        CredentialOccurrence::Absent
    } else {
        CredentialOccurrence::Single(Cow::Owned(text.to_owned()))
    }
}

/// An address as proxies write it, with or without a port.
fn parse_ip(text: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(text).ok()?.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let ip = bare.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    ip.ok().map(|ip: IpAddr| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn proxy_request<'a>(headers: &[(&'a str, &'a str)], target: &'a str) -> ProxyRequest<'a> {
        ProxyRequest {
            protocol: ProxyProtocol::ExtAuthz,
            proxy_removes_headers: true,
            method: b"GET",
            host: b"api.test",
            target: target.as_bytes(),
            headers: headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect(),
            client_source: ClientSource::Peer(Some("10.0.0.1".parse().unwrap())),
            proxy_request_id: b"",
        }
    }

    fn token(headers: &[(&str, &str)]) -> Result<Option<String>, ()> {
        match proxy_request(headers, "/").find_credential(&GatewaySettings::default()) {
            RequestCredential::None => Ok(None),
            RequestCredential::Multiple => Err(()),
            RequestCredential::Single { token, .. } => Ok(Some(token.into_owned())),
        }
    }

    #[test]
    fn one_credential_is_found_wherever_it_may_stand() {
        for good in [
            &[("authorization", "Bearer abc")][..],
            &[("authorization", "bEARER  abc ")],
            &[("x-api-key", " abc")],
            &[("authorization", "Bearer abc"), ("x-api-key", "abc")],
            &[("authorization", "Basic eDp5"), ("x-api-key", "abc")],
            &[("authorization", "Digest a=\"b\", c=d"), ("authorization", "Bearer abc")],
        ] {
            assert_eq!(token(good), Ok(Some("abc".to_owned())), "{good:?}");
        }
        for none in
            [&[][..], &[("authorization", "Basic eDp5")], &[("authorization", "abc")], &[("x-api-key", "")]]
        {
            assert_eq!(token(none), Ok(None), "{none:?}");
        }
    }

    #[test]
    fn several_credentials_are_refused_joined_or_apart() {
        for many in [
            &[("authorization", "Bearer a"), ("x-api-key", "b")][..],
            &[("authorization", "Bearer a"), ("authorization", "Bearer b")],
            &[("authorization", "Bearer a"), ("authorization", "Bearer a")],
            &[("authorization", "Bearer a,Bearer b")],
            &[("authorization", "Basic x,Bearer b")],
            &[("x-api-key", "a,b")],
            &[("x-api-key", "a"), ("x-api-key", "a")],
        ] {
            assert_eq!(token(many), Err(()), "{many:?}");
        }
    }

    #[test]
    fn the_query_is_looked_at_only_when_told_to() {
        let request = proxy_request(&[], "/a?x=1&api_key=a%2Bb&y");
        assert!(request.find_credential(&GatewaySettings::default()) == RequestCredential::None);
        let settings = GatewaySettings { credential_query: Some("api_key".into()), ..Default::default() };
        let RequestCredential::Single { token, headers, in_query: query } =
            request.find_credential(&settings)
        else {
            panic!()
        };
        assert_eq!((&*token, headers.len(), query), ("a+b", 0, true));
        assert!(
            proxy_request(&[], "/a?api_key=a&api_key=b").find_credential(&settings)
                == RequestCredential::Multiple
        );
        for encoded in ["/a?api%5Fkey=a", "/a?%61pi_key=a", "/a?api_key=a&api%5Fkey=a"] {
            let shown = proxy_request(&[], encoded).find_credential(&settings);
            assert!(shown == RequestCredential::Multiple, "{encoded}: a proxy would not take it away");
        }
        assert!(
            proxy_request(&[("x-api-key", "b")], "/a?api_key=a").find_credential(&settings)
                == RequestCredential::Multiple
        );
    }

    #[test]
    fn the_client_is_so_many_hops_away() {
        let ip = |forwarded: &[&str], hops| {
            let headers: Vec<_> = forwarded.iter().map(|value| ("x-forwarded-for", *value)).collect();
            proxy_request(&headers, "/").client_ip(hops).map(|ip| ip.to_string())
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(ip(&["6.6.6.6"], 0), some("10.0.0.1"), "nobody in front is believed");
        assert_eq!(ip(&["6.6.6.6, 1.1.1.1"], 1), some("1.1.1.1"));
        assert_eq!(ip(&["6.6.6.6, 1.1.1.1,10.0.0.1"], 1), some("1.1.1.1"), "Envoy appended its own peer");
        assert_eq!(ip(&["6.6.6.6", "1.1.1.1:80, 2.2.2.2"], 2), some("1.1.1.1"));
        assert_eq!(ip(&["[2001:db8::1]:443"], 1), some("2001:db8::1"));
        assert_eq!(ip(&["::ffff:1.2.3.4"], 1), some("1.2.3.4"));
        assert_eq!(ip(&["1.1.1.1"], 2), None);
        assert_eq!(ip(&["nonsense"], 1), None);
        assert_eq!(ip(&[], 1), None);
    }

    #[test]
    fn behind_a_proxy_that_forwards_the_last_address_is_its_peer() {
        let headers = [("x-forwarded-for", "6.6.6.6, 1.1.1.1, 2.2.2.2")];
        let request =
            ProxyRequest { client_source: ClientSource::LastForwarded, ..proxy_request(&headers, "/") };
        assert_eq!(request.client_ip(0), Some("2.2.2.2".parse().unwrap()));
        assert_eq!(request.client_ip(1), Some("1.1.1.1".parse().unwrap()));
    }

    #[test]
    fn a_named_header_is_given_once() {
        assert_eq!(proxy_request(&[("x-a", " acme ")], "/").single_header("x-a"), Ok(Some("acme")));
        assert_eq!(proxy_request(&[("x-a", "")], "/").single_header("x-a"), Ok(None));
        for bad in [&[("x-a", "a,b")][..], &[("x-a", "a"), ("x-a", "a")], &[("x-a", "é")], &[("x-a", "a\tb")]]
        {
            assert_eq!(proxy_request(bad, "/").single_header("x-a"), Err(()), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_headers_make_it_panic(values in proptest::collection::vec(any::<Vec<u8>>(), 0..4), target: Vec<u8>) {
            let names = ["authorization", "x-api-key", "x-forwarded-for", "authorization"];
            let headers = names.iter().zip(&values).map(|(name, value)| (name.as_bytes(), &value[..])).collect();
            let request = ProxyRequest { headers, target: &target, ..proxy_request(&[], "/") };
            let settings = GatewaySettings { credential_query: Some("k".into()), ..Default::default() };
            let _ = (request.find_credential(&settings), request.client_ip(0), request.client_ip(2), request.request_id());
        }
    }
}
