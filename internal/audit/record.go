// Package audit keeps the audit log: what was released, refused and changed, one record a line, each line carrying the hash
// of the one before it.
//
// The chain shows an edit, an insertion and a removal. Checkpoints signed by the realm's identity show a chain that was
// computed anew, and the head, kept outside of the log as well, shows a tail that was cut off. Whoever holds the realm and
// may write to the host can still write a whole new log: only a head that was kept elsewhere shows that.
package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"keybroker/internal/octet"
)

// MaxLine is the longest record in octets, without the end of its line.
const MaxLine = 64 << 10

const (
	maxText   = 4096          // octets of the longest text in a record; a cgroup's path fits
	shortText = 64            // the same when there are so many long texts that the record is too long; a key's name fits
	maxBody   = MaxLine - 256 // octets of a record without what the log adds
)

// Event says what a record is about.
type Event string

// The events. The log itself writes checkpoint, recovered, dropped and reset.
const (
	EventRelease    Event = "release"     // keys are about to leave
	EventRefusal    Event = "refusal"     // they were asked for and do not
	EventAck        Event = "ack"         // a receiver says what became of its keys
	EventCheckpoint Event = "checkpoint"  // a signature over the log so far
	EventStart      Event = "start"       // the broker began to serve
	EventStop       Event = "stop"        // it ends as it was told
	EventPolicy     Event = "policy"      // another policy is in force
	EventTicket     Event = "ticket"      // a boot ticket changed
	EventSlot       Event = "slot"        // a keyslot was added, removed or tried
	EventLock       Event = "lock"        // the realm was closed
	EventUnlock     Event = "unlock"      // the realm was opened
	EventBreakGlass Event = "break-glass" // keys were derived outside of the broker's rules
	EventRecovered  Event = "recovered"   // the log was found with an unfinished end, which was cut off
	EventDropped    Event = "dropped"     // records were left out because the disk was full
	EventReset      Event = "reset"       // the log begins anew; the one before was set aside
)

// Events returns all of them.
func Events() []Event {
	return []Event{
		EventRelease, EventRefusal, EventAck, EventCheckpoint, EventStart, EventStop, EventPolicy, EventTicket, EventSlot,
		EventLock, EventUnlock, EventBreakGlass, EventRecovered, EventDropped, EventReset,
	}
}

// What a record's Decision says.
const (
	Granted = "granted"
	Refused = "refused"
)

// Hash is the SHA-256 of a record's octets, without the end of its line. Before the first record it is zero.
type Hash [32]byte

// String returns the hash in lower-case hex.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText returns the hash in lower-case hex.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText takes 64 lower-case hex digits.
func (h *Hash) UnmarshalText(text []byte) error {
	if !isHex(string(text), 64) {
		return errors.New("not a hash: 64 lower-case hex digits are expected")
	}
	_, err := hex.Decode(h[:], text)
	return err
}

// Record is one line of the log. Zero fields are left out of it. It never holds key octets, nor anything that they could be
// computed from. The order of the fields is that of the line.
type Record struct {
	Seq  uint64    `json:"seq"`  // 1, 2, ...; set by the log
	Prev Hash      `json:"prev"` // of the record before; set by the log
	Time time.Time `json:"time"` // UTC; set by the log

	Event    Event    `json:"event"`
	Decision string   `json:"decision,omitzero"` // Granted, Refused or nothing
	Code     string   `json:"code,omitzero"`     // a refusal's stable code
	Reason   string   `json:"reason,omitzero"`   // for a human
	Count    uint64   `json:"count,omitzero"`    // how many like this one were not written by themselves
	Tier     string   `json:"tier,omitzero"`
	Subject  string   `json:"subject,omitzero"`
	Names    []string `json:"names,omitzero"`
	Epochs   []uint32 `json:"epochs,omitzero"` // of the names, in their order; nothing when there are no epochs
	Kind     string   `json:"kind,omitzero"`   // of evidence
	Instance string   `json:"instance,omitzero"`
	Peer     string   `json:"peer,omitzero"` // what the transport knows: "cid 7", "127.0.0.1:40000"
	Caller   *Caller  `json:"caller,omitzero"`
	Rule     string   `json:"rule,omitzero"` // of the policy, that decided

	Transcript string `json:"transcript,omitzero"` // T: 128 hex digits
	Receiver   string `json:"receiver,omitzero"`   // SHA-256 of its public key: 64 hex digits
	Policy     string `json:"policy,omitzero"`     // SHA-256 of the policy in force: 64 hex digits
	Evidence   string `json:"evidence,omitzero"`   // SHA-256 of the evidence: 64 hex digits

	Checkpoint *Checkpoint `json:"checkpoint,omitzero"` // in a checkpoint, and only there
}

// Caller is a process of the host, as the kernel names it.
type Caller struct {
	UID  uint32 `json:"uid"`
	Unit string `json:"unit,omitzero"` // the whole cgroup path
	PID  int32  `json:"pid,omitzero"`
}

// Checkpoint is a signature over the head that the log had, under the realm's identity. It speaks for every record up to Seq.
type Checkpoint struct {
	Seq       uint64    `json:"seq"`
	Hash      Hash      `json:"hash"`
	Time      time.Time `json:"time"` // of the signature
	Realm     string    `json:"realm"`
	Signature string    `json:"signature"` // Ed25519, base64url: 86 characters
}

// ErrRecord is a record that does not keep the rules of this format.
var ErrRecord = errors.New("not a record")

// Parse reads one line, without its end. What is not octet for octet what Encode writes is an error, and the record nil.
func Parse(line []byte) (*Record, error) {
	if len(line) > MaxLine {
		return nil, fmt.Errorf("%w: %d octets, a record has at most %d", ErrRecord, len(line), MaxLine)
	}
	r := new(Record)
	if err := json.Unmarshal(line, r, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	if !bytes.Equal(r.Encode(nil), line) {
		return nil, fmt.Errorf("%w: it is not written as this program writes it", ErrRecord)
	}
	return r, nil
}

// Encode appends the record's one encoding to dst: a JSON object on one line, without the line's end.
func (r *Record) Encode(dst []byte) []byte {
	dst = appendHead(dst, r.Seq, &r.Prev, r.Time)
	return r.appendBody(dst)
}

// appendHead writes what the log itself adds to a record.
func appendHead(dst []byte, seq uint64, prev *Hash, now time.Time) []byte {
	dst = append(dst, `{"seq":`...)
	dst = strconv.AppendUint(dst, seq, 10)
	dst = append(dst, `,"prev":"`...)
	dst = hex.AppendEncode(dst, prev[:])
	dst = append(dst, `","time":"`...)
	dst = now.UTC().AppendFormat(dst, time.RFC3339Nano)
	return append(dst, '"')
}

// appendBody writes the rest, by hand: a tier 1 request waits for it.
func (r *Record) appendBody(dst []byte) []byte {
	dst = append(dst, `,"event":`...)
	dst = quote(dst, string(r.Event))
	dst = appendText(dst, "decision", r.Decision)
	dst = appendText(dst, "code", r.Code)
	dst = appendText(dst, "reason", r.Reason)
	if r.Count != 0 {
		dst = append(dst, `,"count":`...)
		dst = strconv.AppendUint(dst, r.Count, 10)
	}
	dst = appendText(dst, "tier", r.Tier)
	dst = appendText(dst, "subject", r.Subject)
	dst = r.appendNames(dst)
	dst = appendText(dst, "kind", r.Kind)
	dst = appendText(dst, "instance", r.Instance)
	dst = appendText(dst, "peer", r.Peer)
	dst = r.Caller.append(dst)
	dst = appendText(dst, "rule", r.Rule)
	dst = appendText(dst, "transcript", r.Transcript)
	dst = appendText(dst, "receiver", r.Receiver)
	dst = appendText(dst, "policy", r.Policy)
	dst = appendText(dst, "evidence", r.Evidence)
	dst = r.Checkpoint.append(dst)
	return append(dst, '}')
}

func (r *Record) appendNames(dst []byte) []byte {
	for i, n := range r.Names {
		dst = separate(dst, i, `,"names":[`)
		dst = quote(dst, n)
	}
	if r.Names != nil {
		dst = append(dst, ']')
	}
	for i, e := range r.Epochs {
		dst = separate(dst, i, `,"epochs":[`)
		dst = strconv.AppendUint(dst, uint64(e), 10)
	}
	if r.Epochs != nil {
		dst = append(dst, ']')
	}
	return dst
}

// separate writes what comes before element i of a list that begins with open.
func separate(dst []byte, i int, open string) []byte {
	if i == 0 {
		return append(dst, open...)
	}
	return append(dst, ',')
}

func (c *Caller) append(dst []byte) []byte {
	if c == nil {
		return dst
	}
	dst = append(dst, `,"caller":{"uid":`...)
	dst = strconv.AppendUint(dst, uint64(c.UID), 10)
	dst = appendText(dst, "unit", c.Unit)
	if c.PID != 0 {
		dst = append(dst, `,"pid":`...)
		dst = strconv.AppendInt(dst, int64(c.PID), 10)
	}
	return append(dst, '}')
}

func (c *Checkpoint) append(dst []byte) []byte {
	if c == nil {
		return dst
	}
	dst = append(dst, `,"checkpoint":{"seq":`...)
	dst = strconv.AppendUint(dst, c.Seq, 10)
	dst = append(dst, `,"hash":"`...)
	dst = hex.AppendEncode(dst, c.Hash[:])
	dst = append(dst, `","time":"`...)
	dst = c.Time.UTC().AppendFormat(dst, time.RFC3339Nano)
	dst = append(dst, `","realm":`...)
	dst = quote(dst, c.Realm)
	dst = append(dst, `,"signature":`...)
	dst = quote(dst, c.Signature)
	return append(dst, '}')
}

func appendText(dst []byte, name, value string) []byte {
	if value == "" {
		return dst
	}
	dst = append(dst, `,"`...)
	dst = append(dst, name...)
	dst = append(dst, `":`...)
	return quote(dst, value)
}

// quote writes a JSON string. Most have nothing to escape.
func quote(dst []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= 0x7f {
			dst, _ = jsontext.AppendQuote(dst, s) // bad UTF-8 becomes U+FFFD; bound and check see to it
			return dst
		}
	}
	dst = append(dst, '"')
	dst = append(dst, s...)
	return append(dst, '"')
}

// check says whether the record keeps the format's rules, apart from the order of the log.
func (r *Record) check() error {
	switch {
	case r.Event == "":
		return fmt.Errorf("%w: it has no event", ErrRecord)
	case (r.Event == EventCheckpoint) != (r.Checkpoint != nil):
		return fmt.Errorf("%w: a signature belongs to a checkpoint, and only there", ErrRecord)
	case r.Names != nil && len(r.Names) == 0 || r.Epochs != nil && len(r.Epochs) == 0:
		return fmt.Errorf("%w: an empty list", ErrRecord)
	case len(r.Epochs) != 0 && len(r.Epochs) != len(r.Names):
		return fmt.Errorf("%w: %d epochs for %d names", ErrRecord, len(r.Epochs), len(r.Names))
	case r.Decision != "" && r.Decision != Granted && r.Decision != Refused:
		return fmt.Errorf("%w: decision is %q, not %s or %s", ErrRecord, r.Decision, Granted, Refused)
	}
	if err := r.checkDigests(); err != nil {
		return err
	}
	return r.Checkpoint.check()
}

func (r *Record) checkDigests() error {
	for _, d := range [...]struct {
		name, value string
		digits      int
	}{
		{"transcript", r.Transcript, 128}, {"receiver", r.Receiver, 64}, {"policy", r.Policy, 64}, {"evidence", r.Evidence, 64},
	} {
		if d.value != "" && !isHex(d.value, d.digits) {
			return fmt.Errorf("%w: %s is not %d lower-case hex digits", ErrRecord, d.name, d.digits)
		}
	}
	return nil
}

func (c *Checkpoint) check() error {
	if c == nil {
		return nil
	}
	if !isHex(c.Realm, 32) {
		return fmt.Errorf("%w: a checkpoint's realm is not 32 lower-case hex digits", ErrRecord)
	}
	if s, err := octet.ParseBase64(c.Signature); err != nil || len(s) != ed25519.SignatureSize {
		return fmt.Errorf("%w: a checkpoint's signature is not 64 octets in base64url", ErrRecord)
	}
	return nil
}

func isHex(s string, digits int) bool {
	if len(s) != digits {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// texts are the record's free texts; a peer may have a say in them.
func (r *Record) texts() [10]*string {
	return [...]*string{(*string)(&r.Event), &r.Decision, &r.Code, &r.Reason, &r.Tier, &r.Subject, &r.Kind, &r.Instance, &r.Peer, &r.Rule}
}

// bound makes every text valid UTF-8 of at most max octets. What a peer sent must not keep a refusal out of the log; a
// release's own texts are never that long.
func (r *Record) bound(max int) {
	for _, s := range r.texts() {
		*s = cut(*s, max)
	}
	if r.Caller != nil && cut(r.Caller.Unit, max) != r.Caller.Unit {
		c := *r.Caller
		c.Unit = cut(c.Unit, max)
		r.Caller = &c
	}
	for i, n := range r.Names {
		if cut(n, max) != n {
			r.Names = append([]string(nil), r.Names...)
			r.Names[i] = cut(n, max)
		}
	}
}

// cut returns s as valid UTF-8 of at most max octets, with a mark where something is missing.
func cut(s string, max int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= max {
		return s
	}
	return strings.ToValidUTF8(s[:max-len("…")], "") + "…"
}
