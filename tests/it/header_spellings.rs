//! The shipped Envoy and nginx files between a client that spells headers oddly and services that take many spellings
//! for one name: none arrives as who calls, nor as another method, path or host.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use keyward::domain::header_name::{IDENTITY_HEADERS, KEYWARD_PREFIX, OVERRIDE_HEADERS};

use crate::{
    envoy::{port_placeholder, read_deployed_file},
    forward_auth::ForwardAuthServer,
    header_folding_service::{HeaderFoldingService, parse_seen_headers},
    process::{TestHome, plain_key_request},
    proxy::{EnvoyProcess, NginxProcess, fill_placeholders},
    raw_http::{RawConnection, RawRequest},
};

/// Every character of a field name that is neither a letter nor a digit.
const SEPARATORS: &str = "-_.!#$%&'*+^`|~";
/// What the client would be.
const ROOT: &str = "root";

/// A name in the way that CGI programs see it.
fn folded(name: &str) -> String {
    let one = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
    name.chars().map(one).collect()
}

fn titled(name: &str) -> String {
    let mut start = true;
    let one = |letter: char| {
        let upper = std::mem::replace(&mut start, !letter.is_ascii_alphanumeric());
        if upper { letter.to_ascii_uppercase() } else { letter }
    };
    name.chars().map(one).collect()
}

fn alternating(name: &str) -> String {
    let one = |(at, letter): (usize, char)| if at % 2 == 0 { letter.to_ascii_uppercase() } else { letter };
    name.char_indices().map(one).collect()
}

/// Spellings of a name: other separators in one place or in all, other cases, more separators than there were.
fn spellings_of(name: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for (at, separator) in SEPARATORS.chars().enumerate() {
        let separator = separator.to_string();
        let every = name.replace('-', &separator);
        let first = name.replacen('-', &separator, 1);
        let (start, end) = name.rsplit_once('-').unwrap();
        let last = format!("{start}{separator}{end}");
        let cases: [fn(&str) -> String; 3] = [titled, alternating, |name| name.to_ascii_uppercase()];
        all.extend([cases[at % 3](&every), cases[(at + 1) % 3](&first), every, first, last]);
        if "-_.~".contains(&*separator) {
            let doubled = name.replace('-', &separator.repeat(2));
            all.extend([format!("{separator}{name}"), format!("{name}{separator}"), doubled]);
        }
    }
    all
}

fn identity_spellings() -> BTreeSet<String> {
    let later = format!("{KEYWARD_PREFIX}later");
    IDENTITY_HEADERS.into_iter().chain([&*later]).flat_map(spellings_of).collect()
}

/// Those, and the same of each override.
fn all_spellings() -> Vec<String> {
    let overrides = OVERRIDE_HEADERS.into_iter().flat_map(spellings_of);
    identity_spellings().into_iter().chain(overrides).collect()
}

/// What a service sees under names that are Keyward's, or that override: by name as a CGI program sees it.
fn reserved(body: &[u8]) -> BTreeMap<String, BTreeSet<String>> {
    let mut found = BTreeMap::<String, BTreeSet<String>>::new();
    for (name, value) in parse_seen_headers(body) {
        let name = folded(&name);
        if name.starts_with(KEYWARD_PREFIX) || OVERRIDE_HEADERS.contains(&&*name) {
            found.entry(name).or_default().insert(value);
        }
    }
    found
}

/// Sends each spelling through a proxy over a connection that is kept; how many requests passed.
#[track_caller]
fn send_all(proxy: SocketAddr, token: &str) -> usize {
    let request = RawRequest::get("/monitors/7").bearer(token);
    let mut connection = RawConnection::open(proxy).unwrap();
    let honest = connection.send(&request).unwrap();
    assert_eq!(honest.status, 200, "{honest:?}");
    let identity = reserved(&honest.body);
    let names: Vec<_> = identity.keys().map(String::as_str).collect();
    let expected = ["x-keyward-account", "x-keyward-environment", "x-keyward-key-id", "x-keyward-scopes"];
    assert_eq!(names, expected, "{honest:?}");
    let mut passed = 0;
    for spelling in all_spellings() {
        let request = request.clone().header(&spelling, ROOT);
        let response = connection.send(&request).unwrap_or_else(|error| panic!("{spelling}: {error}"));
        match response.status {
            200 => {
                assert_eq!(reserved(&response.body), identity, "{spelling}: {}", response.text());
                passed += 1;
            }
            status => assert_eq!(status, 400, "{spelling}: {response:?}"),
        }
        if response.header("connection") == Some("close") {
            connection = RawConnection::open(proxy).unwrap();
        }
    }
    passed
}

/// A proxy in front of a service; dropped, it ends.
type ProxyUnderTest = (SocketAddr, Box<dyn std::any::Any>);

/// Sends each spelling through a proxy to PHP, and to a WSGI program.
async fn nothing_made_up_arrives(start: impl Fn(&ForwardAuthServer, SocketAddr) -> ProxyUnderTest) {
    let front = ForwardAuthServer::start_with(&["--envoy-listen", "127.0.0.1:0"]).await;
    let (_, token) = front.create_key(plain_key_request()).await;
    let (php, wsgi) = (HeaderFoldingService::start_php(), HeaderFoldingService::start_wsgi());
    let (before_php, before_wsgi) = (start(&front, php.address), start(&front, wsgi.address));
    let passed = std::thread::scope(|scope| {
        let sends = [before_php.0, before_wsgi.0].map(|proxy| {
            let token = &token;
            scope.spawn(move || send_all(proxy, token))
        });
        sends.map(|sent| sent.join().unwrap())
    });
    assert!(passed.iter().all(|passed| *passed > 300), "{passed:?}: too many were refused to say anything");
}

fn envoy(yaml: &str) -> ProxyUnderTest {
    let envoy = EnvoyProcess::start(yaml);
    (envoy.listener_address("edge"), Box::new(envoy))
}

#[test]
fn there_are_five_hundred_spellings_and_the_services_take_them_for_the_names() {
    let spellings = identity_spellings();
    assert!(spellings.len() >= 500, "{}", spellings.len());
    let takes_for_user = |service: &HeaderFoldingService, spelling: &str| {
        let answer = RawRequest::get("/").header(spelling, ROOT).send(service.address);
        let user = |(name, _): &(String, String)| name == "X_KEYWARD_USER";
        parse_seen_headers(&answer.body).iter().any(user)
    };
    let php = HeaderFoldingService::start_php();
    for spelling in ["x-keyward-user", "X_Keyward_User", "X.Keyward.User", "x.keyward_user"] {
        assert!(takes_for_user(&php, spelling), "{spelling}");
    }
    let wsgi = HeaderFoldingService::start_wsgi();
    for spelling in ["x-keyward-user", "X_Keyward_User", "x-keyward_USER"] {
        assert!(takes_for_user(&wsgi, spelling), "{spelling}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_gets_through_envoy_over_grpc() {
    nothing_made_up_arrives(|front, service| {
        let keyward = front.keyward.process.envoy_address().unwrap().port();
        let ports = [(10000, 0), (50052, keyward), (8080, service.port())]
            .map(|(of, is)| (port_placeholder(of), port_placeholder(is)));
        let ports = ports.each_ref().map(|(of, is)| (of.as_str(), is.as_str()));
        envoy(&fill_placeholders(&read_deployed_file("minimal.yaml"), &ports))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_gets_through_an_envoy_that_shows_few_headers() {
    nothing_made_up_arrives(|front, service| {
        let keyward = front.keyward.process.envoy_address().unwrap().port();
        let ports = [(10000, 0), (9901, 0), (50052, keyward), (50062, keyward), (8080, service.port())];
        let ports = ports.map(|(of, is)| (port_placeholder(of), port_placeholder(is)));
        let mut values: Vec<_> = ports.iter().map(|(of, is)| (of.as_str(), is.as_str())).collect();
        values.push(("{ max_tokens: 1000, tokens", "{ max_tokens: 1000000, tokens"));
        envoy(&fill_placeholders(&read_deployed_file("production.yaml"), &values))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_gets_through_envoy_over_http() {
    nothing_made_up_arrives(|front, service| {
        let ports = [(10000, 0), (50053, front.address.port()), (8080, service.port())];
        let ports = ports.map(|(of, is)| (port_placeholder(of), port_placeholder(is)));
        let ports = ports.each_ref().map(|(of, is)| (of.as_str(), is.as_str()));
        envoy(&fill_placeholders(&read_deployed_file("http.yaml"), &ports))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_gets_through_nginx() {
    nothing_made_up_arrives(|front, service| {
        let nginx = NginxProcess::start(&crate::nginx::nginx_config(front.address, service));
        (nginx.address, Box::new(nginx))
    })
    .await;
}

// Traefik, as far as it can be tried without one. ----------------------------------------------------------------------

/// The shipped file.
fn traefik() -> serde_json::Value {
    serde_saphyr::from_str(include_str!("../../deploy/traefik/keyward.yaml")).unwrap()
}

#[test]
fn traefik_replaces_or_removes_every_name_by_its_file() {
    let file = traefik();
    let middlewares = &file["http"]["middlewares"];
    for name in ["keyward", "keyward-monitors"] {
        let asks = &middlewares[name]["forwardAuth"];
        assert_eq!(asks["trustForwardHeader"], false, "{name}");
        let replaced: Vec<_> = asks["authResponseHeaders"].as_array().unwrap().iter().collect();
        let replaced: BTreeSet<_> = replaced.iter().map(|header| folded(header.as_str().unwrap())).collect();
        for header in IDENTITY_HEADERS.into_iter().chain(["authorization", "x-api-key"]) {
            assert!(replaced.contains(header), "{name}: {header}");
        }
        let odd = regex::Regex::new(asks["authResponseHeadersRegex"].as_str().unwrap()).unwrap();
        for spelling in all_spellings() {
            let plain = spelling.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
            assert_eq!(odd.is_match(&spelling), !plain, "{name}: {spelling}");
        }
    }
    let cleaned = middlewares["keyward-clean"]["headers"]["customRequestHeaders"].as_object().unwrap();
    let cleaned: BTreeSet<_> =
        cleaned.iter().map(|(name, value)| (folded(name), value.as_str().unwrap())).collect();
    assert_eq!(cleaned, OVERRIDE_HEADERS.into_iter().map(|name| (name.to_owned(), "")).collect());
    for (name, router) in file["http"]["routers"].as_object().unwrap() {
        let chain: Vec<_> =
            router["middlewares"].as_array().unwrap().iter().filter_map(|one| one.as_str()).collect();
        assert!(chain[0].starts_with("keyward") && chain[1..] == ["keyward-clean"], "{name}: {chain:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn traefik_gets_400_for_what_its_file_does_not_name() {
    let front = ForwardAuthServer::start_with(&[]).await;
    let (_, token) = front.create_key(plain_key_request()).await;
    let mut connection = RawConnection::open(front.address).unwrap();
    let request = RawRequest::get("/auth/traefik")
        .header("X-Forwarded-Method", "GET")
        .header("X-Forwarded-Host", "api.test")
        .header("X-Forwarded-Uri", "/monitors/7")
        .bearer(&token);
    assert_eq!(connection.send(&request).unwrap().status, 200);
    for spelling in all_spellings() {
        let name = folded(&spelling);
        let reserved = name.starts_with(KEYWARD_PREFIX) || OVERRIDE_HEADERS.contains(&&*name);
        let named =
            IDENTITY_HEADERS.iter().chain(&OVERRIDE_HEADERS).any(|name| spelling.eq_ignore_ascii_case(name));
        let status = connection.send(&request.clone().header(&spelling, ROOT)).unwrap().status;
        let refused = reserved && !named || spelling.eq_ignore_ascii_case("x-forwarded-host");
        if refused {
            assert!(status == 400 || status == 503, "{spelling}: {status}");
        } else {
            // A method is overridden where a rule tells methods apart.
            assert!(
                status == 200 || spelling.to_ascii_lowercase().contains("method"),
                "{spelling}: {status}"
            );
        }
    }
}

#[test]
fn doctor_finds_no_fault_with_the_shipped_nginx_file_and_sees_one_that_sends_a_header_on() {
    let home = TestHome::new();
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/nginx/keyward.conf");
    let ended = home.run_to_end(home.command(["doctor", "--database", &home.url(), "--nginx", shipped]));
    assert!(ended.out.contains("ok    nginx"), "{ended:?}");
    let text = std::fs::read_to_string(shipped).unwrap();
    let bad = home.path("bad.conf");
    std::fs::write(&bad, fill_placeholders(&text, &[("proxy_set_header X-Original-Url \"\";", "")])).unwrap();
    let ended = home.run_to_end(home.command([
        "doctor",
        "--database",
        &home.url(),
        "--nginx",
        bad.to_str().unwrap(),
    ]));
    assert!(ended.out.contains("warn  nginx") && ended.out.contains("x-original-url"), "{ended:?}");
}
