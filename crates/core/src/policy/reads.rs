//! What a policy's conditions read of a query: found by walking them, so that a decision is remembered only under
//! everything it depends on, and a context is built only as far as it is looked at.

use std::fmt;

use cedar_policy_core::ast::{BinaryOp, Expr, ExprKind, Literal, Var};

/// A set of the parts of a query that policies can depend on, beyond scope. Action and service are always part of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Reads(u32);

/// Which entities the conditions of a policy need in order to follow `in`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) enum Hierarchy {
    /// None: nothing in the conditions asks for an ancestor.
    #[default]
    None,
    /// Those of the query itself: principal, action, resource.
    Own,
    /// All that the law knows: an entity literal stands on the left of an `in`.
    Whole,
}

const MEMBERS: [(Reads, &str); 16] = [
    (Reads::PRINCIPAL, "principal"),
    (Reads::PATH, "resource"),
    (Reads::METHOD, "request.method"),
    (Reads::REQUEST_PATH, "request.path"),
    (Reads::OPERATION, "request.operation"),
    (Reads::PROTOCOL, "request.protocol"),
    (Reads::HOST, "request.host"),
    (Reads::SIZE, "request.size"),
    (Reads::IP, "origin.ip"),
    (Reads::TRUST_DOMAIN, "origin.trust_domain"),
    (Reads::NOW, "time.now"),
    (Reads::CLOCK, "time.hour or time.weekday"),
    (Reads::FIRST_CONTACT, "first_contact"),
    (Reads::TOKEN, "token"),
    (Reads::RISK, "risk"),
    (Reads::POSTURE, "posture"),
];

impl Reads {
    /// Nothing but the scope.
    pub const NOTHING: Self = Self(0);
    /// Who asks, beyond the roles they have.
    pub const PRINCIPAL: Self = Self(1);
    /// The resource, beyond the service it belongs to.
    pub const PATH: Self = Self(1 << 1);
    /// `context.request.method`.
    pub const METHOD: Self = Self(1 << 2);
    /// `context.request.path`.
    pub const REQUEST_PATH: Self = Self(1 << 3);
    /// `context.request.operation`.
    pub const OPERATION: Self = Self(1 << 4);
    /// `context.request.protocol`.
    pub const PROTOCOL: Self = Self(1 << 5);
    /// `context.request.host`.
    pub const HOST: Self = Self(1 << 6);
    /// `context.request.size`.
    pub const SIZE: Self = Self(1 << 7);
    /// `context.origin.ip`.
    pub const IP: Self = Self(1 << 8);
    /// `context.time.now`: the answer may change with any second.
    pub const NOW: Self = Self(1 << 9);
    /// `context.time.hour` or `.weekday`: the answer may change with the hour.
    pub const CLOCK: Self = Self(1 << 10);
    /// `context.first_contact`.
    pub const FIRST_CONTACT: Self = Self(1 << 11);
    /// `context.origin.trust_domain`.
    pub const TRUST_DOMAIN: Self = Self(1 << 12);
    /// `context.token`.
    pub const TOKEN: Self = Self(1 << 13);
    /// `context.risk`.
    pub const RISK: Self = Self(1 << 14);
    /// `context.posture`.
    pub const POSTURE: Self = Self(1 << 15);
    /// What signals say of the caller.
    pub const CONDITION: Self = Self(Self::RISK.0 | Self::POSTURE.0);
    /// Everything below `context.request`.
    pub const REQUEST: Self = Self(
        Self::METHOD.0 | Self::REQUEST_PATH.0 | Self::OPERATION.0 | Self::PROTOCOL.0 | Self::HOST.0 | Self::SIZE.0,
    );
    /// Everything below `context.origin`.
    pub const ORIGIN: Self = Self(Self::IP.0 | Self::TRUST_DOMAIN.0);
    /// Everything below `context.time`.
    pub const TIME: Self = Self(Self::NOW.0 | Self::CLOCK.0);
    /// Everything below `context`.
    pub const CONTEXT: Self = Self(
        Self::REQUEST.0 | Self::ORIGIN.0 | Self::TIME.0 | Self::FIRST_CONTACT.0 | Self::TOKEN.0 | Self::CONDITION.0,
    );

    #[cfg(test)]
    pub(super) const ALL: Self = Self(Self::CONTEXT.0 | Self::PRINCIPAL.0 | Self::PATH.0);

    /// Whether any of `other` is in it.
    pub const fn any_of(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both together.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the answer can change by the mere passing of time: an open exchange is then judged again when the
    /// hour turns ([`Reads::CLOCK`]), every second ([`Reads::NOW`]), or when what a signal said ends or falls ([`Reads::CONDITION`]).
    pub const fn changes_with_time(self) -> bool {
        self.any_of(Self::TIME.and(Self::CONDITION))
    }
}

impl fmt::Debug for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(MEMBERS.iter().filter(|(part, _)| self.any_of(*part)).map(|(_, name)| name)).finish()
    }
}

impl fmt::Display for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = MEMBERS.iter().filter(|(part, _)| self.any_of(*part)).map(|(_, name)| *name).collect();
        f.write_str(&names.join(", "))
    }
}

/// What `condition` reads, and the hierarchy it needs.
pub(super) fn of(condition: &Expr) -> (Reads, Hierarchy) {
    let mut walk = Walk { reads: Reads::NOTHING, hierarchy: Hierarchy::None };
    walk.expression(condition);
    (walk.reads, walk.hierarchy)
}

/// The member of the context that `expr` names: `["request", "path"]`; empty for the context itself.
pub(super) fn context_member(expr: &Expr) -> Option<Vec<&str>> {
    match expr.expr_kind() {
        ExprKind::Var(Var::Context) => Some(Vec::new()),
        ExprKind::GetAttr { expr, attr } => {
            let mut member = context_member(expr)?;
            member.push(attr);
            Some(member)
        }
        _ => None,
    }
}

struct Walk {
    reads: Reads,
    hierarchy: Hierarchy,
}

impl Walk {
    fn expression(&mut self, expr: &Expr) {
        match expr.expr_kind() {
            ExprKind::Lit(_) | ExprKind::Slot(_) | ExprKind::Unknown(_) => {}
            ExprKind::Var(var) => self.variable(*var),
            ExprKind::If { test_expr, then_expr, else_expr } => {
                [test_expr, then_expr, else_expr].into_iter().for_each(|part| self.expression(part));
            }
            ExprKind::And { left, right } | ExprKind::Or { left, right } => {
                self.expression(left);
                self.expression(right);
            }
            ExprKind::UnaryApp { arg, .. } => self.expression(arg),
            ExprKind::BinaryApp { op: BinaryOp::In, arg1, arg2 } => self.membership(arg1, arg2),
            ExprKind::BinaryApp { arg1, arg2, .. } => {
                self.expression(arg1);
                self.expression(arg2);
            }
            ExprKind::ExtensionFunctionApp { args, .. } => args.iter().for_each(|arg| self.expression(arg)),
            ExprKind::GetAttr { expr, attr } | ExprKind::HasAttr { expr, attr } => self.attribute(expr, &[attr]),
            ExprKind::ExtHasAttr { expr, attrs } => {
                let attrs: Vec<&str> = attrs.iter().map(|attr| attr.as_str()).collect();
                self.attribute(expr, &attrs);
            }
            ExprKind::Like { expr, .. } => self.expression(expr),
            // Every principal is a workload and every resource an operation: their type says nothing of them.
            ExprKind::Is { expr, .. } if matches!(expr.expr_kind(), ExprKind::Var(_)) => {}
            ExprKind::Is { expr, .. } => self.expression(expr),
            ExprKind::Set(items) => items.iter().for_each(|item| self.expression(item)),
            ExprKind::Record(members) => members.values().for_each(|member| self.expression(member)),
        }
    }

    fn variable(&mut self, var: Var) {
        let read = match var {
            Var::Principal => Reads::PRINCIPAL,
            Var::Resource => Reads::PATH,
            Var::Action => Reads::NOTHING,
            Var::Context => Reads::CONTEXT,
        };
        self.reads = self.reads.and(read);
    }

    /// `left in right`. The principal's roles and the resource's service are part of every place in the index, so
    /// asking only for those reads nothing more.
    fn membership(&mut self, left: &Expr, right: &Expr) {
        let own = |expr: &Expr, kinds: &[&str]| match expr.expr_kind() {
            ExprKind::Lit(Literal::EntityUID(uid)) => kinds.contains(&uid.entity_type().to_string().as_str()),
            _ => false,
        };
        let all = |kinds: &[&str]| match right.expr_kind() {
            ExprKind::Set(items) => items.iter().all(|item| own(item, kinds)),
            _ => own(right, kinds),
        };
        let needs = match left.expr_kind() {
            ExprKind::Var(Var::Action) => Hierarchy::Own,
            ExprKind::Var(Var::Principal) if all(&["Role"]) => Hierarchy::Own,
            ExprKind::Var(Var::Resource) if all(&["Service", "Namespace", "Sensitivity"]) => Hierarchy::Own,
            ExprKind::Var(var) => {
                self.variable(*var);
                Hierarchy::Own
            }
            _ => {
                self.expression(left);
                Hierarchy::Whole
            }
        };
        self.hierarchy = self.hierarchy.max(needs);
        self.expression(right);
    }

    fn attribute(&mut self, expr: &Expr, attrs: &[&str]) {
        let Some(mut member) = context_member(expr) else { return self.expression(expr) };
        member.extend(attrs);
        let read = match member[..] {
            ["request", "method", ..] => Reads::METHOD,
            ["request", "path", ..] => Reads::REQUEST_PATH,
            ["request", "operation", ..] => Reads::OPERATION,
            ["request", "protocol", ..] => Reads::PROTOCOL,
            ["request", "host", ..] => Reads::HOST,
            ["request", "size", ..] => Reads::SIZE,
            ["request", ..] => Reads::REQUEST,
            ["origin", "ip", ..] => Reads::IP,
            ["origin", "trust_domain", ..] => Reads::TRUST_DOMAIN,
            ["origin", ..] => Reads::ORIGIN,
            ["time", "now", ..] => Reads::NOW,
            ["time", "hour" | "weekday", ..] => Reads::CLOCK,
            ["time", ..] => Reads::TIME,
            ["first_contact", ..] => Reads::FIRST_CONTACT,
            ["token", ..] => Reads::TOKEN,
            ["risk", ..] => Reads::RISK,
            ["posture", ..] => Reads::POSTURE,
            // A member that the schema does not have can only be asked for with `has`: it is never there.
            _ => Reads::NOTHING,
        };
        self.reads = self.reads.and(read);
    }
}
