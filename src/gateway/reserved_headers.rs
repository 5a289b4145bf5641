//! Classifies the headers that have a meaning for Keyward or for the service behind the proxy.
//!
//! A lenient service reads `X.Keyward.User` as `x-keyward-user` ([`header_name`]). A header whose name only resembles a
//! reserved one is therefore removed and never read. A request with different values under such names is denied.

use smallvec::SmallVec;

use crate::domain::header_name::{
    self, IDENTITY_HEADERS, METHOD_OVERRIDE_HEADERS, OVERRIDE_HEADERS, is_equivalent,
};

use super::{request::ProxyRequest, settings::GatewaySettings};

/// Names that the proxy writes and that are read elsewhere: another spelling of them is the client's.
const PROXY_WRITTEN_HEADERS: [&str; 2] = ["x-forwarded-for", "x-request-id"];

/// Why a name is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReservedClass {
    /// The gateway reads it: a credential, an account, a customer.
    Read,
    /// The gateway sets it toward the service.
    Identity,
    /// It has the prefix of [`ReservedClass::Identity`], but none of its names.
    Unknown,
    /// It overrides the method, path or host of a request.
    Override,
    ProxyWritten,
}

/// A reserved name, as a header spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ReservedMatch<'a> {
    name: &'a str,
    class: ReservedClass,
    /// Whether the header's name is this one, and not only alike.
    exact: bool,
}

/// The names that are reserved for one request.
#[derive(Clone, Copy)]
pub(super) struct ReservedHeaders<'a> {
    settings: &'a GatewaySettings,
    identifier_headers: &'a [Box<str>],
}

impl<'a> ReservedHeaders<'a> {
    /// The names of the settings, and of `named_by`: the headers that the route reads.
    pub(super) fn new(settings: &'a GatewaySettings, named_by: &'a [Box<str>]) -> ReservedHeaders<'a> {
        ReservedHeaders { settings, identifier_headers: named_by }
    }

    /// The reserved name that a header's name is or is alike.
    fn find_reserved(&self, name: &[u8]) -> Option<ReservedMatch<'a>> {
        let read =
            self.settings.credential_headers.iter().chain(self.identifier_headers).map(|known| &**known);
        let mut found = None;
        for known in read.filter(|known| is_equivalent(name, known.as_bytes())) {
            let exact = name.eq_ignore_ascii_case(known.as_bytes());
            if exact || found.is_none() {
                found = Some(ReservedMatch { name: known, class: ReservedClass::Read, exact });
            }
        }
        if found.is_some() || !matches!(name.first(), Some(b'x' | b'X')) {
            return found;
        }
        let among = |names: &'static [&'static str], class| {
            let known = names.iter().find(|known| is_equivalent(name, known.as_bytes()))?;
            Some(ReservedMatch { name: known, class, exact: name.eq_ignore_ascii_case(known.as_bytes()) })
        };
        if header_name::has_keyward_prefix(name) {
            let unknown = ReservedMatch {
                name: header_name::KEYWARD_PREFIX,
                class: ReservedClass::Unknown,
                exact: false,
            };
            return among(&IDENTITY_HEADERS, ReservedClass::Identity).or(Some(unknown));
        }
        among(&OVERRIDE_HEADERS, ReservedClass::Override)
            .or_else(|| among(&PROXY_WRITTEN_HEADERS, ReservedClass::ProxyWritten))
    }

    /// A name that the request spells in several ways with different values: services differ in which they take.
    pub(super) fn find_conflict(&self, request: &ProxyRequest<'_>) -> Option<&'a str> {
        /// What is known of one name. Two of its headers differ in spelling and in value if and only if some differ in
        /// the one and some in the other.
        struct HeaderSpellings<'a> {
            name: &'a str,
            spelling: &'a [u8],
            value: &'a [u8],
            spellings_differ: bool,
            values_differ: bool,
        }
        let mut all = SmallVec::<[HeaderSpellings<'_>; 4]>::new();
        for (spelling, value) in &request.headers {
            let Some(found) = self.find_reserved(spelling) else { continue };
            if matches!(found.class, ReservedClass::Unknown | ReservedClass::ProxyWritten) {
                continue;
            }
            let value = value.trim_ascii();
            let Some(seen) = all.iter_mut().find(|seen| seen.name == found.name) else {
                let (spellings_differ, values_differ) = (false, false);
                all.push(HeaderSpellings {
                    name: found.name,
                    spelling,
                    value,
                    spellings_differ,
                    values_differ,
                });
                continue;
            };
            seen.spellings_differ |= !seen.spelling.eq_ignore_ascii_case(spelling);
            seen.values_differ |= seen.value != value;
            if seen.spellings_differ && seen.values_differ {
                return Some(found.name);
            }
        }
        None
    }

    /// A name of which the request has a spelling that the proxy cannot be asked to remove.
    pub(super) fn find_unremovable(&self, request: &ProxyRequest<'_>) -> Option<&'a str> {
        let name = |found: ReservedMatch<'a>| {
            (!found.exact && found.class != ReservedClass::ProxyWritten).then_some(found.name)
        };
        let kept = |header: &[u8]| !request.proxy_removes_headers || !header_name::is_field_name(header);
        request
            .headers
            .iter()
            .find_map(|(header, _)| self.find_reserved(header).filter(|_| kept(header)).and_then(name))
    }

    /// Whether the request asks the service to take it for one of another method.
    pub(super) fn overrides_method(request: &ProxyRequest<'_>) -> bool {
        request.headers.iter().any(|(name, value)| {
            !value.trim_ascii().is_empty()
                && METHOD_OVERRIDE_HEADERS.iter().any(|known| is_equivalent(name, known.as_bytes()))
        })
    }

    /// Every name, in lower case, that must not reach the service: `set` are those that the gateway sets itself. Names
    /// that the request does not show are among them, since a proxy may keep headers from the gateway.
    pub(super) fn names_to_remove(
        &self,
        request: &ProxyRequest<'_>,
        set: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        let always = IDENTITY_HEADERS.iter().chain(&OVERRIDE_HEADERS).filter(|name| !set(name));
        let mut removed: Vec<String> = always.map(|name| (*name).to_owned()).collect();
        for (name, _) in &request.headers {
            let Some(found) = self.find_reserved(name) else { continue };
            if found.exact && !header_name::has_keyward_prefix(name) {
                continue;
            }
            let name = String::from_utf8_lossy(name).to_ascii_lowercase();
            if !set(&name) && !removed.contains(&name) {
                removed.push(name);
            }
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::{ClientSource, ProxyProtocol};
    use proptest::prelude::*;

    type Header<'a> = (&'a [u8], &'a [u8]);

    fn proxy_request(headers: Vec<Header<'_>>) -> ProxyRequest<'_> {
        ProxyRequest {
            protocol: ProxyProtocol::ExtAuthz,
            proxy_removes_headers: true,
            method: b"GET",
            host: b"api.test",
            target: b"/",
            headers,
            client_source: ClientSource::Peer(None),
            proxy_request_id: b"",
        }
    }

    fn headers<'a>(list: &[(&'a str, &'a str)]) -> Vec<Header<'a>> {
        list.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect()
    }

    fn conflict(list: &[(&str, &str)]) -> Option<String> {
        let (settings, named_by) = (GatewaySettings::default(), ["x-customer".into()]);
        ReservedHeaders::new(&settings, &named_by)
            .find_conflict(&proxy_request(headers(list)))
            .map(str::to_owned)
    }

    #[test]
    fn two_spellings_with_different_values_are_a_conflict() {
        for (list, name) in [
            (&[("x-customer", "a"), ("X_Customer", "b")][..], "x-customer"),
            (&[("x.customer", "a"), ("accept", "b"), ("X_Customer", "b")], "x-customer"),
            (&[("x-api-key", "a"), ("X_Api_Key", "")], "x-api-key"),
            (&[("x-keyward-user", "a"), ("x.keyward.user", "b")], "x-keyward-user"),
            (&[("x-original-url", "/a"), ("x_original_url", "/b")], "x-original-url"),
            (&[("x_api_key", "a"), ("x-api-key", "a"), ("x_api_key", "b")], "x-api-key"),
            (
                &[("x_original_url", "/a"), ("x_original_url", "/b"), ("x-original-url", "/a")],
                "x-original-url",
            ),
        ] {
            assert_eq!(conflict(list).as_deref(), Some(name), "{list:?}");
        }
        for list in [
            &[("x-customer", "a"), ("X_Customer", " a ")][..],
            &[("x-customer", "a"), ("X-Customer", "b")],
            &[("x_customer", "a")],
            &[("x-keyward-one", "a"), ("x-keyward-two", "b"), ("x_keyward_one", "c")],
            &[("x-forwarded-for", "a"), ("x_forwarded_for", "b")],
        ] {
            assert_eq!(conflict(list), None, "{list:?}");
        }
    }

    #[test]
    fn a_proxy_that_removes_nothing_by_itself_is_asked_to_remove_nothing_odd() {
        let settings = GatewaySettings::default();
        let unremovable = |removes, name: &str| {
            let request =
                ProxyRequest { proxy_removes_headers: removes, ..proxy_request(headers(&[(name, "a")])) };
            ReservedHeaders::new(&settings, &[]).find_unremovable(&request).map(str::to_owned)
        };
        for (name, of) in [
            ("X.Keyward.User", "x-keyward-user"),
            ("x-keyward-later", "x-keyward-"),
            ("x_api_key", "x-api-key"),
            ("x_http_method_override", "x-http-method-override"),
        ] {
            assert_eq!((unremovable(false, name).as_deref(), unremovable(true, name)), (Some(of), None));
        }
        for name in ["x-keyward-user", "x-original-url", "x-api-key", "x_forwarded_for", "accept", "x_other"]
        {
            assert_eq!(unremovable(false, name), None, "{name}");
        }
        assert_eq!(
            unremovable(true, "x keyward user").as_deref(),
            Some("x-keyward-user"),
            "it has no field name"
        );
    }

    /// Whether a service that is lenient in this way may see such a header, without tables.
    fn may_stay(name: &str) -> bool {
        let folded: String =
            name.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect();
        let folded = folded.to_ascii_lowercase();
        let read = ["authorization", "x-api-key", "x-customer", "x-forwarded-for", "x-request-id"];
        if folded.starts_with("x-keyward-") || OVERRIDE_HEADERS.contains(&&*folded) {
            return false;
        }
        !read.contains(&&*folded) || read.contains(&&*name.to_ascii_lowercase())
    }

    fn name() -> impl Strategy<Value = String> {
        let known =
            ["x-api-key", "authorization", "x-customer", "x-forwarded-for", "x-keyward-other", "accept"];
        let known = proptest::sample::select([&IDENTITY_HEADERS[..], &OVERRIDE_HEADERS[..], &known].concat());
        let token = "[!#$%&'*+.^_`|~a-zA-Z0-9-]";
        (known, proptest::collection::vec((any::<proptest::sample::Index>(), token), 0..3)).prop_map(
            |(name, changes)| {
                let mut name: Vec<char> = name.chars().collect();
                for (at, with) in changes {
                    let at = at.index(name.len());
                    // A separator for a separator, and a letter for a letter, most of the time.
                    let with = with.chars().next().unwrap();
                    if name[at].is_ascii_alphanumeric() == with.is_ascii_alphanumeric() {
                        name[at] =
                            if with.is_ascii_alphanumeric() { name[at].to_ascii_uppercase() } else { with };
                    }
                }
                name.into_iter().collect()
            },
        )
    }

    proptest! {
        #[test]
        fn whatever_may_be_taken_for_a_reserved_name_is_removed(names in proptest::collection::vec(name(), 0..8)) {
            let (settings, named_by) = (GatewaySettings::default(), ["x-customer".into()]);
            let reserved = ReservedHeaders::new(&settings, &named_by);
            let list: Vec<Header<'_>> = names.iter().map(|name| (name.as_bytes(), &b"1"[..])).collect();
            let removed = reserved.names_to_remove(&proxy_request(list), |_| false);
            for name in &names {
                let gone = removed.contains(&name.to_ascii_lowercase());
                prop_assert_eq!(!gone, may_stay(name), "{} {:?}", name, removed);
            }
        }

        #[test]
        fn only_values_that_differ_under_alike_names_conflict(
            list in proptest::collection::vec((name(), "[ab]"), 0..6)
        ) {
            let (settings, named_by) = (GatewaySettings::default(), ["x-customer".into()]);
            let headers: Vec<Header<'_>> =
                list.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
            let found = ReservedHeaders::new(&settings, &named_by).find_conflict(&proxy_request(headers)).is_some();
            let pair = list.iter().any(|(one, a)| list.iter().any(|(other, b)| {
                let reserved = ["authorization", "x-api-key", "x-customer"].iter().chain(&IDENTITY_HEADERS).chain(&OVERRIDE_HEADERS);
                let mut reserved = reserved.filter(|name| is_equivalent(one.as_bytes(), name.as_bytes()));
                is_equivalent(one.as_bytes(), other.as_bytes()) && !one.eq_ignore_ascii_case(other) && a != b && reserved.next().is_some()
            }));
            prop_assert_eq!(found, pair, "{:?}", list);
        }

        #[test]
        fn no_names_make_it_panic(list in proptest::collection::vec(any::<(Vec<u8>, Vec<u8>)>(), 0..6)) {
            let settings = GatewaySettings::default();
            let headers = list.iter().map(|(name, value)| (&name[..], &value[..])).collect();
            let (reserved, request) = (ReservedHeaders::new(&settings, &[]), proxy_request(headers));
            let _ = (reserved.find_conflict(&request), reserved.find_unremovable(&request), reserved.names_to_remove(&request, |_| false));
        }
    }
}
