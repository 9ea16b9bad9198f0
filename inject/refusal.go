package inject

import (
	"errors"
	"fmt"
	"net/http"
)

// Code is a refusal's stable name: in answers, logs, status and the audit alike.
type Code string

// Codes of refusals. They are documented in docs/protocol.md and never change their meaning.
const (
	CodeMalformed     Code = "malformed"            // the request is not of the protocol's form
	CodeTooLarge      Code = "too-large"            // more octets than the protocol allows
	CodeWrongIssuer   Code = "wrong-issuer"         // meant for another broker
	CodeBadNonce      Code = "bad-nonce"            // never given on this connection, or used before
	CodeExpiredNonce  Code = "expired-nonce"        // given more than a minute ago
	CodeWrongTier     Code = "wrong-tier"           // the policy entry is of another tier, or this listener is
	CodeWrongKind     Code = "wrong-kind"           // evidence of a kind that this tier does not take
	CodeBadEvidence   Code = "bad-evidence"         // the evidence does not verify
	CodeUnknownPeer   Code = "unknown-peer"         // the transport does not say who this is
	CodePeerMismatch  Code = "peer-mismatch"        // hypervisor and record, or record and claim, disagree
	CodeNoPolicy      Code = "no-policy"            // no policy entry
	CodeDenied        Code = "denied"               // an administrator denied the VM, or the caller may not change things
	CodeNoTicket      Code = "no-ticket"            // no boot ticket: this boot has no right to keys
	CodeReceiverTaken Code = "receiver-taken"       // another receiver of this boot has the keys
	CodeKeyNotAllowed Code = "key-not-allowed"      // the policy entry does not list this key
	CodeUnknownEpoch  Code = "unknown-epoch"        // no such epoch yet
	CodeRetiredEpoch  Code = "retired-epoch"        // an epoch that is over
	CodeLocked        Code = "locked"               // the realm is not open
	CodeAudit         Code = "audit-unavailable"    // no record can be written, so nothing is released
	CodeBadMetadata   Code = "bad-metadata"         // the domain's definition cannot be read: in status alone
	CodeHypervisor    Code = "hypervisor-no-answer" // libvirt cannot be asked
	CodeBusy          Code = "busy"                 // too many requests at once
	CodeInternal      Code = "internal"             // the broker's log has the cause
)

// Refusal is the answer that gives no key. On the wire it is an unsigned hint.
type Refusal struct {
	Code   Code   `json:"code"`
	Reason string `json:"reason,omitzero"` // what was wrong, for a peer that the transport has identified
	Rule   string `json:"rule,omitzero"`   // the policy rule that decided, likewise
	Next   string `json:"next,omitzero"`   // what to do about it, likewise
	// Cause is for the broker's own log, status and explain: what policy expected. It never travels.
	Cause error `json:"-"`
}

// Error shows what the peer is told.
func (r Refusal) Error() string {
	s := string(r.Code)
	if r.Reason != "" {
		s += ": " + r.Reason
	}
	if r.Next != "" {
		s += " (" + r.Next + ")"
	}
	return s
}

// Is matches on the code alone: errors.Is(err, Refusal{Code: CodeLocked}) holds on either side of the network.
func (r Refusal) Is(target error) bool {
	t, ok := target.(Refusal)
	return ok && t.Code == r.Code
}

// Unwrap gives the cause, which stays on the broker's side.
func (r Refusal) Unwrap() error { return r.Cause }

// AsRefusal finds the refusal in err; any other error is an internal one, whose cause only the log shows.
func AsRefusal(err error) Refusal {
	if r := (Refusal{}); errors.As(err, &r) {
		return r
	}
	return Refusal{Code: CodeInternal, Reason: "the broker's log has the cause", Cause: err}
}

// HTTPStatus maps a code to its status.
func (c Code) HTTPStatus() int {
	switch c {
	case CodeMalformed, CodeWrongIssuer, CodeBadNonce, CodeExpiredNonce:
		return http.StatusBadRequest
	case CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case CodeBusy:
		return http.StatusTooManyRequests
	case CodeLocked, CodeAudit, CodeHypervisor:
		return http.StatusServiceUnavailable
	case CodeInternal:
		return http.StatusInternalServerError
	}
	return http.StatusForbidden
}

// maxShown is how many octets of a peer's words are shown.
const maxShown = 512

func malformed(what string, err error) Refusal {
	return Refusal{Code: CodeMalformed, Reason: fmt.Sprintf("%s: %v", what, err)}
}
