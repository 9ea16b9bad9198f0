// Package endorsements is a store of AMD's certificates and revocation lists in a folder, one file each.
//
// Nothing in it is trusted for being there: what is read is verified up to the roots of the store's Verifier, and must be what
// its name says. Nothing here uses a network: see package keyservice.
//
//	vcek/LINE-HARDWAREID-TCB.der    a VCEK's certificate; TCB is all parts of the line's in the order of snp.TCBParts
//	vlek-LINE-PROVIDER-TCB.der      a VLEK's; PROVIDER is the beginning of the SHA-256 of CSP_ID
//	ask-LINE-SERIAL.der             also asvk, ark
//	crl-LINE-DIGEST.der             DIGEST is the beginning of its SHA-256
package endorsements

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/internal/folder"
)

// Bounds of a store.
const (
	maxFile   = 256 << 10 // octets of one endorsement
	maxVCEKs  = 16384     // files: those of as many chips and TCBs
	maxOthers = 256       // files
	maxKnown  = 4096      // endorsements that are remembered as good
	maxFound  = 8         // VLEKs, issuers and revocation lists of a line, each, that an appraisal gets
)

// errFull says that a store has as many files as it may have.
var errFull = errors.New("the store of endorsements is full")

// ErrRefused says that what should be stored does not verify, or is not what was wanted. Nothing of it was stored.
var ErrRefused = errors.New("refused")

// Config says what a store is.
type Config struct {
	Dir      string        // the folder; needs to exist only once something is read or put
	Verifier *snp.Verifier // with the roots that everything must lead to
}

// A Store is a store of endorsements. It may be used by many goroutines, and its folder by many processes.
type Store struct {
	dir      string
	verifier *snp.Verifier

	mu    sync.Mutex
	known map[[sha256.Size]byte]*snp.Endorsement // by the digest of its octets
}

// New returns a store. Nothing is read yet.
func New(c Config) (*Store, error) {
	if c.Dir == "" || c.Verifier == nil {
		return nil, errors.New("opening a store of endorsements: expected a folder and a verifier")
	}
	return &Store{dir: c.Dir, verifier: c.Verifier, known: map[[sha256.Size]byte]*snp.Endorsement{}}, nil
}

// Make makes a store's folder, unless it is there. The folder that it is in must exist.
func Make(dir string) error { return folder.Make(dir) }

// Dir returns the store's folder.
func (s *Store) Dir() string { return s.dir }

func (s *Store) open() (*folder.Folder, error) {
	f, err := folder.Open(s.dir)
	if err != nil {
		return nil, fmt.Errorf("opening the store of endorsements: %w", err)
	}
	return f, nil
}

// nameOf returns under which name an endorsement is stored. All its parts come from tables, numbers and digests.
func nameOf(e *snp.Endorsement) string {
	var tail strings.Builder
	for _, n := range snp.TCBValues(e.Line, e.Key.TCB) {
		fmt.Fprintf(&tail, "-%d", n)
	}
	switch e.Kind {
	case attest.VCEK:
		return fmt.Sprintf("vcek/%s-%x%s.der", e.Line, e.Key.Chip, tail.String())
	case attest.VLEK:
		return fmt.Sprintf("vlek-%s-%s%s.der", e.Line, digest([]byte(e.Key.CSP)), tail.String())
	case snp.CRL:
		return fmt.Sprintf("crl-%s-%s.der", e.Line, digest(e.DER))
	}
	return fmt.Sprintf("%s-%s-%x.der", strings.ToLower(e.Kind), e.Line, e.Serial)
}

// digest is the beginning of a SHA-256, 16 digits.
func digest(octets []byte) string {
	sum := sha256.Sum256(octets)
	return hex.EncodeToString(sum[:8])
}

// read reads one file, verifies it, and holds it against its name.
func (s *Store) read(f *folder.Folder, name string) (*snp.Endorsement, error) {
	octets, err := f.Read(name, maxFile)
	if err != nil {
		return nil, err
	}
	e, err := s.verify(f, octets, nil)
	if err != nil {
		return nil, err
	}
	if want := nameOf(e); want != name {
		return nil, fmt.Errorf("expected what its name says, got what should be called %s", want)
	}
	return e, nil
}

// verify verifies an endorsement, with issuers that are given or stored. What was good once is remembered: it costs up to two RSA
// signatures, and being good does not change.
func (s *Store) verify(f *folder.Folder, der []byte, issuers [][]byte) (*snp.Endorsement, error) {
	id := sha256.Sum256(der)
	s.mu.Lock()
	e := s.known[id]
	s.mu.Unlock()
	if e != nil {
		return e, nil
	}
	e, err := s.verifier.Endorsement(der, issuers)
	if missing := (*snp.MissingIssuerError)(nil); errors.As(err, &missing) && f != nil {
		e, err = s.verifier.Endorsement(der, s.issuers(f, missing.Line))
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for old := range s.known {
		if len(s.known) < maxKnown {
			break
		}
		delete(s.known, old)
	}
	s.known[id] = e
	return e, nil
}

// issuers returns the ASKs and ASVKs of a line that are stored.
func (s *Store) issuers(f *folder.Folder, line string) [][]byte {
	var out [][]byte
	for _, kind := range []string{snp.ASK, snp.ASVK} {
		list, _ := s.readAll(f, prefix(kind, line), "")
		out = append(out, octetsOf(list)...)
	}
	return out
}

func octetsOf(list []*snp.Endorsement) [][]byte {
	var out [][]byte
	for _, e := range list {
		out = append(out, e.DER)
	}
	return out
}

// prefix is how the names of all endorsements of a kind and line begin, but for VCEKs.
func prefix(kind, line string) string { return strings.ToLower(kind) + "-" + line + "-" }

// readAll reads the files whose names have this beginning and end, at most maxFound good ones. The errors are about the others.
func (s *Store) readAll(f *folder.Folder, prefix, suffix string) ([]*snp.Endorsement, []error) {
	names, err := f.Names(".")
	if err != nil {
		return nil, []error{err}
	}
	return s.readNamed(f, names, prefix, suffix)
}

// readNamed does so with names that were listed.
func (s *Store) readNamed(f *folder.Folder, names []string, prefix, suffix string) ([]*snp.Endorsement, []error) {
	slices.Sort(names)
	var out []*snp.Endorsement
	var problems []error
	for _, name := range names {
		if !strings.HasPrefix(name, prefix) || !strings.HasSuffix(name, suffix) || len(out) == maxFound {
			continue
		}
		if e, err := s.read(f, name); err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", name, err))
		} else {
			out = append(out, e)
		}
	}
	return out, problems
}

// Find returns what is stored for reports by any of these keys (see snp.KeysOf): the keys' own certificates, their issuers and
// the revocation lists. Of a key that names neither chip nor provider only the latter two, but a VLEK's of any provider. The
// errors say which files were passed over because they do not verify. It only reads the folder; that it is missing is
// fs.ErrNotExist among the errors.
func (s *Store) Find(keys ...snp.Key) (attest.Endorsements, []error) {
	var out attest.Endorsements
	f, err := s.open()
	if err != nil {
		return out, []error{err}
	}
	defer f.Close()
	var problems []error
	for _, k := range keys {
		list, wrong := s.find(f, k)
		problems = append(problems, wrong...)
		for _, e := range list {
			dst := &out.Certificates
			if e.Kind == snp.CRL {
				dst = &out.CRLs
			}
			*dst = append(*dst, e.DER)
		}
	}
	return out, problems
}

func (s *Store) find(f *folder.Folder, k snp.Key) (out []*snp.Endorsement, problems []error) {
	add := func(list []*snp.Endorsement, wrong []error) {
		out, problems = append(out, list...), append(problems, wrong...)
	}
	names, err := f.Names(".")
	if err != nil {
		return nil, []error{err}
	}
	add(s.readNamed(f, names, prefix(snp.IssuerOf(k.Kind), k.Line), ""))
	add(s.readNamed(f, names, prefix(snp.CRL, k.Line), ""))
	name := nameOf(&snp.Endorsement{Kind: k.Kind, Line: k.Line, Key: k})
	switch {
	case k.Kind == attest.VLEK && k.CSP == "":
		_, tcb, _ := strings.Cut(name, prefix(attest.VLEK, k.Line)+digest(nil))
		add(s.readNamed(f, names, prefix(attest.VLEK, k.Line), tcb))
	case k.Kind == attest.VLEK || len(k.Chip) > 0:
		e, err := s.read(f, name)
		switch {
		case err == nil:
			add([]*snp.Endorsement{e}, nil)
		case !errors.Is(err, fs.ErrNotExist):
			add(nil, []error{fmt.Errorf("%s: %w", name, err)})
		}
	}
	return out, problems
}

// Get returns the certificate of one key. One that is not stored, or whose file does not verify, is an error.
func (s *Store) Get(k snp.Key) (*snp.Endorsement, error) {
	f, err := s.open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return s.read(f, nameOf(&snp.Endorsement{Kind: k.Kind, Line: k.Line, Key: k}))
}

// An Entry is one file of a store.
type Entry struct {
	File        string           // its name, from the store's folder on
	Endorsement *snp.Endorsement // nil if Err is not
	Err         error            // why it is never used
}

// List reads and verifies everything that is stored, in the order of the files' names. What does not verify is in the list as
// well.
func (s *Store) List() ([]Entry, error) {
	f, err := s.open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Names(".")
	if err != nil {
		return nil, err
	}
	vceks, err := f.Names(vcekDir)
	if err != nil {
		return nil, err
	}
	names = append(slices.DeleteFunc(names, func(name string) bool { return name == vcekDir }), vceks...)
	slices.Sort(names)
	var out []Entry
	for _, name := range names {
		e, err := s.read(f, name)
		out = append(out, Entry{name, e, err})
	}
	return out, nil
}

// vcekDir is the folder of VCEKs' certificates: there are many, and nobody needs to look through them.
const vcekDir = "vcek"

// A Stored says what became of an endorsement that was put into a store.
type Stored struct {
	File        string
	Endorsement *snp.Endorsement
	New         bool // false: what is stored already is as good, or better
}

// Put stores endorsements, in place of older ones for the same. All must verify, and wanted, unless it is nil, must accept them:
// otherwise nothing is stored, and the error is ErrRefused. The folder must exist. While another process puts something, it waits
// for ctx to end.
func (s *Store) Put(ctx context.Context, given attest.Endorsements, wanted func([]*snp.Endorsement) error) ([]Stored, error) {
	f, err := s.open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []*snp.Endorsement
	var refused []error
	for i, der := range slices.Concat(given.Certificates, given.CRLs) {
		e, err := s.verify(f, der, given.Certificates)
		if err != nil {
			refused = append(refused, fmt.Errorf("number %d: %w", i+1, err))
			continue
		}
		list = append(list, e)
	}
	if len(refused) == 0 && wanted != nil {
		if err := wanted(list); err != nil {
			refused = append(refused, err)
		}
	}
	if len(refused) > 0 {
		return nil, fmt.Errorf("%w: %w", ErrRefused, errors.Join(refused...))
	}
	return s.put(ctx, f, list)
}

// PutEvidence stores what came along with a report and is of use for this very report. What is not, or does not verify, is passed
// over. It is for evidence that was found genuine: that bounds what a guest can make a store keep.
func (s *Store) PutEvidence(ctx context.Context, ev attest.Evidence) ([]Stored, error) {
	if len(ev.Octets) < snp.ReportSize || len(ev.Octets) > snp.MaxExtended {
		return nil, fmt.Errorf("expected a report of %d octets, with certificates up to %d, got %d", snp.ReportSize, snp.MaxExtended, len(ev.Octets))
	}
	keys, err := snp.KeysOf(ev.Octets[:snp.ReportSize])
	if err != nil {
		return nil, err
	}
	given, err := snp.ParseTable(ev.Octets[snp.ReportSize:])
	if err != nil {
		return nil, err
	}
	f, err := s.open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []*snp.Endorsement
	for _, der := range slices.Concat(given.Certificates, given.CRLs) {
		if e, err := s.verify(f, der, given.Certificates); err == nil && e.Endorses(keys) {
			list = append(list, e)
		}
	}
	return s.put(ctx, f, list)
}

// put stores what was verified. When there is nothing new, nothing is locked and written.
func (s *Store) put(ctx context.Context, f *folder.Folder, list []*snp.Endorsement) ([]Stored, error) {
	slices.SortStableFunc(list, issuersFirst) // so that what is there verifies at any time
	var out []Stored
	news := false
	for _, e := range list {
		fresh := !s.has(f, e)
		news = news || fresh
		out = append(out, Stored{nameOf(e), e, fresh})
	}
	if !news {
		return out, nil
	}
	lock, err := f.Lock(ctx, "store", nil)
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	for i, o := range out {
		if out[i].New = !s.has(f, o.Endorsement); !out[i].New {
			continue
		}
		if err := s.place(f, lock, o); err != nil {
			return out[:i], err
		}
	}
	return out, nil
}

// issuersFirst sorts what signing keys need before these.
func issuersFirst(a, b *snp.Endorsement) int {
	isKey := func(e *snp.Endorsement) int {
		if e.Key.Kind != "" {
			return 1
		}
		return 0
	}
	return isKey(a) - isKey(b)
}

// has reports whether what is stored is as good as e.
func (s *Store) has(f *folder.Folder, e *snp.Endorsement) bool {
	if e.Kind == snp.CRL {
		lists, _ := s.readAll(f, prefix(snp.CRL, e.Line), "")
		return slices.ContainsFunc(lists, func(old *snp.Endorsement) bool { return old.Replaces(e) })
	}
	old, err := s.read(f, nameOf(e))
	return err == nil && old.Replaces(e)
}

// place writes a file, and removes the revocation lists that it makes superfluous: only then, so that at no time fewer are
// revoked.
func (s *Store) place(f *folder.Folder, lock *folder.Lock, o Stored) error {
	if err := checkRoom(f, o.File); err != nil {
		return err
	}
	if err := lock.Write(o.File, o.Endorsement.DER); err != nil {
		return err
	}
	if o.Endorsement.Kind != snp.CRL {
		return nil
	}
	lists, _ := s.readAll(f, prefix(snp.CRL, o.Endorsement.Line), "")
	for _, old := range lists {
		if name := nameOf(old); name != o.File && o.Endorsement.Replaces(old) {
			if err := lock.Remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkRoom refuses a file too many.
func checkRoom(f *folder.Folder, name string) error {
	dir, most := path.Dir(name), maxOthers
	if dir == vcekDir {
		most = maxVCEKs
	}
	names, err := f.Names(dir)
	if err != nil {
		return err
	}
	if len(names) >= most && !slices.Contains(names, name) {
		return fmt.Errorf("%w: expected fewer than %d files; remove those that are not needed any more", errFull, most)
	}
	return nil
}
