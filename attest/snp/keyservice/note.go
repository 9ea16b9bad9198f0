package keyservice

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"time"

	"github.com/go-json-experiment/json"

	"keybroker/attest/snp/internal/folder"
)

// A note is what processes that ask one service tell each other. Only the holder of the lock reads and writes it. Times are by the
// wall clock, which may be set.
type note struct {
	Service string               `json:"service"`
	Next    time.Time            `json:"next"` // not before this may the service be asked
	Got     map[string]time.Time `json:"got"`  // when issuers and revocation lists were got last, by path

	name string
}

const maxNote = 256 << 10

// noteName returns the file of a service's note. It is hidden: a store does not take it for an endorsement.
func noteName(service string) string {
	sum := sha256.Sum256([]byte(service))
	return ".keyservice-" + hex.EncodeToString(sum[:8]) + ".json"
}

// readNote reads a service's note. One that is missing, or cannot be read, allows a request at once or in interval.
func readNote(f *folder.Folder, service string, now time.Time) *note {
	n := &note{name: noteName(service)}
	octets, err := f.Read(n.name, maxNote)
	if err == nil {
		if err := json.Unmarshal(octets, n, json.RejectUnknownMembers(true)); err != nil {
			*n = note{name: n.name, Next: now.Add(interval)}
		}
	}
	n.Service = service
	if n.Got == nil {
		n.Got = map[string]time.Time{}
	}
	maps.DeleteFunc(n.Got, func(_ string, at time.Time) bool { return at.After(now) || now.Sub(at) > maxRetryAfter })
	return n
}

// next returns from when on the service may be asked. A time that no service can have asked for was noted before the clock was
// set back: it counts for no longer than interval.
func (n *note) next(now time.Time) time.Time {
	if n.Next.Sub(now) > maxRetryAfter+interval {
		n.Next = now.Add(interval)
	}
	return n.Next
}

// got reports whether a path was got since then.
func (n *note) got(path string, since time.Time) bool {
	at, ok := n.Got[path]
	return ok && !at.Before(since)
}

func (n *note) write(l *folder.Lock) error {
	octets, err := json.Marshal(n, json.Deterministic(true))
	if err != nil {
		return err
	}
	return l.Write(n.name, octets)
}
