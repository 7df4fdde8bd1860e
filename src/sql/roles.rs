//! Roles: passwords, whose verifiers followers get from the leader, and names that mean somebody else on a follower.

use pg_query::NodeEnum;
use pg_query::protobuf::{DefElem, Node, RoleSpec, RoleSpecType, VariableSetKind};
use serde_json::Value;

use super::classify::Context;
use super::dates::looks_like_now;
use super::lex::{Kind, Lexer};
use super::parse::walk;
use super::plan::{Lane, Password};
use super::refuse::refused;

/// What a definition says that is not the same on a follower, where the session is the proxy's.
pub(super) fn refuse_session(context: &Context<'_>) -> Option<Lane> {
    let (mut session_user, mut from_current) = (false, false);
    walk(&context.tree, &mut |_, fields| {
        let is = |name: &str, value: i32| fields.get(name).and_then(Value::as_i64) == Some(i64::from(value));
        session_user |= is("roletype", RoleSpecType::RolespecSessionUser as i32);
        from_current |= fields.contains_key("is_local") && is("kind", VariableSetKind::VarSetCurrent as i32);
    });
    if session_user {
        return Some(refused(
            "SESSION_USER in a definition is not supported: followers' sessions are the proxy's own",
            "Write CURRENT_USER, or the name of the role.",
        ));
    }
    from_current.then(|| {
        refused(
            "SET ... FROM CURRENT in a definition is not supported: the session on a follower may have another value",
            "Write the value.",
        )
    })
}

fn options(nodes: &[Node]) -> impl Iterator<Item = &DefElem> {
    nodes.iter().filter_map(|node| match node.node.as_ref() {
        Some(NodeEnum::DefElem(option)) => Some(option.as_ref()),
        _ => None,
    })
}

fn text_of(option: &DefElem) -> Option<&str> {
    match option.arg.as_ref()?.node.as_ref()? {
        NodeEnum::String(text) => Some(&text.sval),
        _ => None,
    }
}

/// Why CREATE or ALTER ROLE with these options can not be carried.
pub(super) fn refuse_options(nodes: &[Node]) -> Option<Lane> {
    let until = options(nodes).find(|option| option.defname == "validUntil").and_then(text_of)?;
    looks_like_now(until).then(|| {
        refused("VALID UNTIL a time such as 'tomorrow' would be another one on another server", "Write a fixed time.")
    })
}

/// The password among the options: whose, and where its literal is in the text.
///
/// # Errors
/// The refusal, if it is not where it must be.
pub(super) fn password(nodes: &[Node], role: Option<&str>, text: &str) -> Result<Option<Password>, Lane> {
    let Some(option) = options(nodes).find(|option| option.defname == "password" && text_of(option).is_some()) else {
        return Ok(None);
    };
    let location = usize::try_from(option.location).unwrap_or(usize::MAX);
    let mut tokens = Lexer::new(text)
        .filter(|token| token.kind.is_significant() && token.range.start >= location)
        .skip_while(|token| token.kind == Kind::Word);
    let literal = tokens.next().filter(|token| token.kind == Kind::String);
    let alone = tokens.next().is_none_or(|token| token.kind != Kind::String);
    match literal.filter(|_| alone) {
        Some(literal) => Ok(Some(Password { role: role.map(str::to_owned), at: literal.range })),
        None => Err(refused(
            "the password is not written as one plain string",
            "Write it as one string literal, or use \\password in psql.",
        )),
    }
}

/// The name of a role; `None`: the current one.
pub(super) fn name(role: Option<&RoleSpec>) -> Option<&str> {
    role.map(|role| role.rolename.as_str()).filter(|name| !name.is_empty())
}
