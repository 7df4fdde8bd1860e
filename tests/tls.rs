//! TLS from clients to the proxy: psql as people use it, and a client of our own for what psql can not do wrong.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use common::{Cluster, text};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];

/// Of the password "secret", as every server stores it.
const VERIFIER: &str = "SCRAM-SHA-256$4096:cGd0YW5kZW0tc2FsdC0wMQ==$yvD2IusQGdMSRO25gzHOM1jSQ0AqAAkZ+N0RYP2LwVA=:JaWZ4KnhpPNXfQ3yyxX+UPipbLtbiiHmW5CsR1ZQkAg=";

fn root(cluster: &Cluster) -> PathBuf {
    cluster.layout.ca_dir().join("ca.pem")
}

/// Runs psql through the proxy; gives whether it succeeded, and what it said.
fn psql(cluster: &Cluster, options: &str, commands: &[&str]) -> (bool, String) {
    let port = cluster.layout.proxy_port();
    let mut psql = Command::new(cluster.layout.plan.bin_dir.join("psql"));
    psql.args(["-X", "-At", "-v", "ON_ERROR_STOP=1", "-d"]);
    psql.arg(format!("host=localhost hostaddr=127.0.0.1 port={port} user=postgres dbname=postgres {options}"));
    for command in commands {
        psql.args(["-c", command]);
    }
    let output = psql.env("PGPASSWORD", "secret").output().expect("psql");
    (output.status.success(), text(&output))
}

fn startup(user: &str) -> Vec<u8> {
    let mut body = 196_608_u32.to_be_bytes().to_vec();
    body.extend_from_slice(format!("user\0{user}\0database\0postgres\0\0").as_bytes());
    let length = u32::try_from(body.len() + 4).unwrap();
    [&length.to_be_bytes()[..], &body].concat()
}

/// What comes until the server closes or is ready for a query.
fn answer(stream: &mut impl Read) -> String {
    let (mut all, mut part) = (Vec::new(), [0; 1024]);
    while !all.ends_with(b"Z\0\0\0\x05I") {
        match stream.read(&mut part) {
            Ok(n) if n > 0 => all.extend_from_slice(&part[..n]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

fn raw(cluster: &Cluster) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", cluster.layout.proxy_port())).expect("the proxy listens");
    stream.set_read_timeout(Some(common::LIMIT)).unwrap();
    stream
}

fn tls(
    cluster: &Cluster,
    stream: TcpStream,
    alpn: &[&[u8]],
) -> rustls::StreamOwned<rustls::ClientConnection, TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(root(cluster)).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let name = "localhost".try_into().unwrap();
    rustls::StreamOwned::new(rustls::ClientConnection::new(Arc::new(config), name).unwrap(), stream)
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_choose_tls_and_can_verify_the_proxy() {
    let cluster = Cluster::up(&["--tls"]);
    let verify = format!("sslmode=verify-full sslrootcert={}", root(&cluster).display());

    let (ok, said) = psql(&cluster, &verify, &["\\conninfo", "create table t (i int primary key, b text)"]);
    assert!(ok && said.contains("TLSv1.3"), "{said}");
    let old = format!("{verify} ssl_max_protocol_version=TLSv1.2");
    let (ok, said) = psql(&cluster, &old, &["\\conninfo", "insert into t values (0, 'old')"]);
    assert!(ok && said.contains("TLSv1.2"), "{said}");
    let (ok, said) = psql(&cluster, "sslmode=disable", &["\\conninfo"]);
    assert!(ok && !said.contains("TLS"), "{said}");
    // The node's certificate is the cluster's own, and no name for a client.
    let (ok, said) = psql(&cluster, &verify.replace("ca.pem", "ca.key"), &["select 1"]);
    assert!(!ok, "{said}");

    // More than any buffer on the way, in both directions.
    let folder = common::folder();
    let file = folder.path().join("rows");
    let line = "x".repeat(2000);
    let rows: String = (1..=4000).flat_map(|i| [i.to_string(), "\t".into(), line.clone(), "\n".into()]).collect();
    fs::write(&file, &rows).unwrap();
    let (ok, said) = psql(&cluster, &verify, &[&format!("\\copy t from '{}'", file.display())]);
    assert!(ok, "{said}");
    let (ok, said) = psql(&cluster, &verify, &["copy (select * from t where i > 0 order by i) to stdout"]);
    assert!(ok && said == rows, "{} bytes came back", said.len());
    cluster.assert_identical().await;

    a_request_is_answered_as_postgresql_does(&cluster);
    passwords_work_without_channel_binding(&cluster, &verify).await;
}

fn a_request_is_answered_as_postgresql_does(cluster: &Cluster) {
    let mut byte = [0];
    // GSSAPI first, as libpq asks where there is a ticket.
    let mut stream = raw(cluster);
    stream.write_all(&GSSENC_REQUEST).unwrap();
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"N");
    stream.write_all(&SSL_REQUEST).unwrap();
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"S");
    let mut stream = tls(cluster, stream, &[]);
    stream.write_all(&startup("postgres")).unwrap();
    assert!(answer(&mut stream).contains("server_version"));
    // A second request inside.
    let mut stream = raw(cluster);
    stream.write_all(&SSL_REQUEST).unwrap();
    stream.read_exact(&mut byte).unwrap();
    let mut stream = tls(cluster, stream, &[]);
    stream.write_all(&SSL_REQUEST).unwrap();
    assert!(answer(&mut stream).contains("unsupported frontend protocol 1234.5679"));

    // CVE-2021-23222: a start of a session that somebody else put behind the request.
    let mut stream = raw(cluster);
    stream.write_all(&[&SSL_REQUEST[..], &startup("postgres")].concat()).unwrap();
    let said = answer(&mut stream);
    assert!(said.contains("08P01") && said.contains("received unencrypted data after SSL request"), "{said}");

    // TLS at once, as sslnegotiation=direct of PostgreSQL 17 does: only for who names the protocol.
    let mut stream = tls(cluster, raw(cluster), &[b"postgresql"]);
    stream.write_all(&startup("postgres")).unwrap();
    assert!(answer(&mut stream).contains("server_version"));
    let mut stream = tls(cluster, raw(cluster), &[]);
    assert!(stream.write_all(&startup("postgres")).is_err() || answer(&mut stream).is_empty());
    let mut stream = tls(cluster, raw(cluster), &[b"http/1.1"]);
    assert!(stream.write_all(&startup("postgres")).is_err() || answer(&mut stream).is_empty());
}

/// The login is passed through, so it is the one of a unix socket: SCRAM without channel binding.
async fn passwords_work_without_channel_binding(cluster: &Cluster, verify: &str) {
    let node = cluster.connect_node(0, "postgres").await;
    let client = cluster.connect("postgres").await;
    client.batch_execute(&format!("create role carol login password '{VERIFIER}'")).await.unwrap();
    let hba = cluster.layout.pgdata(0).join("pg_hba.conf");
    let rules = fs::read_to_string(&hba).unwrap();
    fs::write(&hba, format!("local all carol scram-sha-256\n{rules}")).unwrap();
    node.batch_execute("select pg_reload_conf()").await.unwrap();
    let carol = |binding: &str| verify.replace("sslmode", &format!("user=carol channel_binding={binding} sslmode"));
    common::wait_for("the rule for carol is read", async || {
        !psql(cluster, &format!("{} password=wrong", carol("prefer")), &["select 1"]).0
    })
    .await;
    let (ok, said) = psql(cluster, &carol("prefer"), &["select current_user"]);
    assert!(ok && said == "carol\n", "{said}");
    let (ok, said) = psql(cluster, &carol("require"), &["select 1"]);
    assert!(!ok && said.contains("channel binding"), "{said}");
    let (ok, said) = psql(cluster, "user=carol sslmode=disable", &["select current_user"]);
    assert!(ok && said == "carol\n", "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_demands_tls_serves_nobody_without() {
    let cluster = Cluster::up(&["--nodes", "1", "--tls"]);
    let config = fs::read_to_string(cluster.config_path()).unwrap();
    assert!(config.contains("tls_required = false"), "{config}");
    let (ok, said) = psql(&cluster, "sslmode=disable", &["select 1"]);
    assert!(ok, "{said}");
    fs::write(cluster.config_path(), config.replace("tls_required = false", "tls_required = true")).unwrap();
    cluster.kill_proxy();
    // `sandbox up` waits for a client without TLS, so the daemon is started by itself.
    let mut proxy = cluster.start(&["proxy"]);
    common::wait_for("the proxy serves", async || psql(&cluster, "sslmode=require", &["select 1"]).0).await;
    let (ok, said) = psql(&cluster, "sslmode=disable", &["select 1"]);
    assert!(!ok && said.contains("connections without TLS are not accepted"), "{said}");
    proxy.kill().unwrap();
    proxy.wait().unwrap();
}
