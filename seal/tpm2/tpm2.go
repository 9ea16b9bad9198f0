// Package tpm2 protects a keyslot by an object that a TPM 2.0 seals under its storage root key (SRK) and a PCR policy.
//
// The slot key is 32 random octets, sealed so that only this TPM, with the selected PCRs at the values of the enrolment, gives it
// back. Every session is salted to the SRK that was recorded at enrolment, and encrypts what crosses the bus both ways: whoever
// listens on the bus, or stands in it with a key of its own, learns nothing.
package tpm2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	gotpm "github.com/google/go-tpm/tpm2"

	"keybroker/internal/octet"
	"keybroker/seal"
)

// Kind is the kind of these slots in a realm file.
const Kind = "tpm2"

// DefaultPath is the kernel's TPM with its resource manager.
const DefaultPath = "/dev/tpmrm0"

// Config says which TPM, and what a new slot is bound to.
type Config struct {
	// Path is that of a device or of an emulator's Unix socket. Required.
	Path string
	// PCRs are those that a new slot is bound to. Required to Enroll.
	PCRs Selection
}

// A Protector opens and makes TPM slots.
type Protector struct {
	c Config
	// tap sees what crosses the bus.
	tap func([]byte)
}

// New returns a protector. The TPM is opened for each call anew.
func New(c Config) (*Protector, error) {
	if c.Path == "" {
		return nil, errors.New("opening the TPM: no path")
	}
	return &Protector{c: c}, nil
}

// params are a slot's public parameters.
type params struct {
	Bank    string       `json:"bank"`
	PCRs    []int        `json:"pcrs"`
	Values  []octet.Hex  `json:"values"` // of the PCRs at enrolment
	SRK     octet.Base64 `json:"srk"`    // TPMT_PUBLIC
	Public  octet.Base64 `json:"public"` // TPMT_PUBLIC
	Private octet.Base64 `json:"private"`
}

// maxBlob bounds each structure of a slot in octets, far above what a TPM makes.
const maxBlob = 1024

// A sealed slot is its parameters, checked.
type sealed struct {
	pcrs    Selection
	values  [][]byte
	srk     []byte // TPMT_PUBLIC
	public  []byte
	private []byte
}

// parse checks a slot's parameters. Its errors quote nothing of them.
func parse(raw jsontext.Value) (*sealed, error) {
	var p params
	if err := json.Unmarshal(raw, &p, json.RejectUnknownMembers(true)); err != nil {
		return nil, ErrParams
	}
	sel, err := newSelection(p.Bank, p.PCRs)
	if err != nil || len(p.Values) != len(sel.pcrs) || len(p.SRK) == 0 || len(p.SRK) > maxBlob || len(p.Public) > maxBlob || len(p.Private) > maxBlob {
		return nil, ErrParams
	}
	s := &sealed{pcrs: sel, srk: p.SRK, public: p.Public, private: p.Private}
	for _, v := range p.Values {
		if len(v) != sel.digestSize() {
			return nil, ErrParams
		}
		s.values = append(s.values, v)
	}
	return s, nil
}

// Describe returns the PCRs that a slot is bound to, as "PCR sha256:7".
func (p *Protector) Describe(raw jsontext.Value) (string, error) {
	s, err := parse(raw)
	if err != nil {
		return "", err
	}
	return "PCR " + s.pcrs.String(), nil
}

// Enroll seals 32 random octets under the PCRs' values of now, and opens them once to see that it works.
func (p *Protector) Enroll(ctx context.Context, b seal.Binding) (raw jsontext.Value, k seal.Key, err error) {
	if p.c.PCRs.isZero() {
		return nil, seal.Key{}, errors.New("sealing in the TPM: no PCRs are selected")
	}
	k = seal.RandomKey()
	err = p.withDevice(ctx, func(d *device) error {
		raw, err = d.seal(p.c.PCRs, k)
		return err
	})
	if err != nil {
		return nil, seal.Key{}, err
	}
	again, err := p.Open(ctx, b, raw)
	if err != nil {
		return nil, seal.Key{}, fmt.Errorf("opening the slot that was just sealed: %w", err)
	}
	defer again.Wipe()
	if !again.Equal(k) {
		return nil, seal.Key{}, errors.New("sealing in the TPM: it returned other octets than were sealed")
	}
	return raw, k, nil
}

// Open unseals the slot's key. The errors of this package say why it cannot.
func (p *Protector) Open(ctx context.Context, _ seal.Binding, raw jsontext.Value) (k seal.Key, err error) {
	s, err := parse(raw)
	if err != nil {
		return seal.Key{}, err
	}
	err = p.withDevice(ctx, func(d *device) error {
		k, err = d.unseal(s)
		return err
	})
	return k, err
}

// withDevice runs f on the open TPM. When a TPM without a resource manager is full of what killed clients left, they are flushed
// and f runs again.
func (p *Protector) withDevice(ctx context.Context, f func(*device) error) error {
	d, err := openDevice(ctx, p.c.Path)
	if err != nil {
		return err
	}
	defer d.Close()
	d.tap = p.tap
	err = f(d)
	if d.alone && isFull(err) {
		if err := d.flushLeftovers(); err != nil {
			return explain(err)
		}
		err = f(d)
	}
	return explain(err)
}

// A root is the SRK, loaded.
type root struct {
	d      *device
	handle gotpm.TPMHandle
	name   gotpm.TPM2BName
	public gotpm.TPMTPublic // sessions are salted to it: at opening, octet for octet the one of the enrolment
}

// loadRoot creates the SRK, which is the same key every time. If want is not nil it must be that one: the TPM's own word for what
// key it has is what somebody in the bus could change.
func (d *device) loadRoot(want []byte) (*root, error) {
	r, err := gotpm.CreatePrimary{PrimaryHandle: gotpm.TPMRHOwner, InPublic: gotpm.New2B(gotpm.ECCSRKTemplate)}.Execute(d)
	switch {
	case errors.Is(err, gotpm.TPMRCBadAuth), errors.Is(err, gotpm.TPMRCAuthFail), errors.Is(err, gotpm.TPMRCHierarchy):
		return nil, fmt.Errorf("%w (%w)", ErrOwnerAuth, err)
	case err != nil:
		return nil, fmt.Errorf("creating the storage root key: %w", err)
	}
	root := &root{d: d, handle: r.ObjectHandle, name: r.Name}
	public, err := r.OutPublic.Contents()
	if err == nil && want != nil && !bytes.Equal(gotpm.Marshal(public), want) {
		err = ErrOtherTPM
	}
	if err != nil {
		root.flush()
		return nil, err
	}
	root.public = *public
	return root, nil
}

// flush frees the SRK's handle. Nothing can be done about an error.
func (r *root) flush() { r.d.flush(r.handle) }

func (d *device) flush(h gotpm.TPMHandle) { gotpm.FlushContext{FlushHandle: h}.Execute(d) }

// salted makes the options of a session whose secret only the SRK can read.
func (r *root) salted(more ...gotpm.AuthOption) []gotpm.AuthOption {
	return append(more, gotpm.Salted(r.handle, r.public))
}

const (
	sessionHash = gotpm.TPMAlgSHA256
	nonceSize   = 16 // octets
	aesBits     = 128
)

// auth authorises the use of the SRK (which has no password) by a session that encrypts both ways.
func (r *root) auth() gotpm.AuthHandle {
	return gotpm.AuthHandle{
		Handle: r.handle, Name: r.name,
		Auth: gotpm.HMAC(sessionHash, nonceSize, r.salted(gotpm.AESEncryption(aesBits, gotpm.EncryptInOut))...),
	}
}

// readPCRs reads the registers, in ascending order, in a session that proves that the TPM itself says so.
func (r *root) readPCRs(sel Selection) ([][]byte, error) {
	var values [][]byte
	const atOnce = 8 // PCR_Read returns no more digests
	for from := 0; from < len(sel.pcrs); from += atOnce {
		some := sel.pcrs[from:min(from+atOnce, len(sel.pcrs))]
		session := gotpm.HMAC(sessionHash, nonceSize, r.salted(gotpm.Audit())...)
		res, err := gotpm.PCRRead{PCRSelectionIn: sel.list(some)}.Execute(r.d, session)
		if err != nil {
			return nil, fmt.Errorf("reading PCRs: %w", err)
		}
		if len(res.PCRValues.Digests) != len(some) {
			return nil, fmt.Errorf("%w: %s", ErrNoBank, sel)
		}
		for _, digest := range res.PCRValues.Digests {
			if len(digest.Buffer) != sel.digestSize() {
				return nil, fmt.Errorf("%w: %s", ErrNoBank, sel)
			}
			values = append(values, digest.Buffer)
		}
	}
	return values, nil
}

// policy computes the digest of a policy that is just PolicyPCR. See TPM 2.0 Library, part 3, section 23.7.
func policy(sel Selection, values [][]byte) ([]byte, error) {
	digest := sha256.Sum256(bytes.Join(values, nil))
	c, err := gotpm.NewPolicyCalculator(sessionHash)
	if err != nil {
		return nil, err
	}
	err = gotpm.PolicyPCR{PcrDigest: gotpm.TPM2BDigest{Buffer: digest[:]}, Pcrs: sel.list(sel.pcrs)}.Update(c)
	return c.Hash().Digest, err
}

// seal makes the sealed object and the slot's parameters.
func (d *device) seal(sel Selection, k seal.Key) (jsontext.Value, error) {
	root, err := d.loadRoot(nil)
	if err != nil {
		return nil, err
	}
	defer root.flush()
	values, err := root.readPCRs(sel)
	if err != nil {
		return nil, err
	}
	digest, err := policy(sel, values)
	if err != nil {
		return nil, fmt.Errorf("computing the policy: %w", err)
	}
	r, err := root.create(digest, k)
	if err != nil {
		return nil, fmt.Errorf("sealing in the TPM: %w", err)
	}
	public, err := r.OutPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("sealing in the TPM: %w", err)
	}
	p := params{Bank: sel.bank, PCRs: sel.pcrs, SRK: gotpm.Marshal(root.public), Public: gotpm.Marshal(public), Private: r.OutPrivate.Buffer}
	for _, v := range values {
		p.Values = append(p.Values, v)
	}
	return json.Marshal(&p, json.Deterministic(true))
}

// create seals k so that the policy alone unseals it (no password), on this TPM alone.
func (r *root) create(policy []byte, k seal.Key) (*gotpm.CreateResponse, error) {
	return gotpm.Create{
		ParentHandle: r.auth(),
		InSensitive: gotpm.TPM2BSensitiveCreate{Sensitive: &gotpm.TPMSSensitiveCreate{
			Data: gotpm.NewTPMUSensitiveCreate(&gotpm.TPM2BSensitiveData{Buffer: k.Octets()}),
		}},
		InPublic: gotpm.New2B(gotpm.TPMTPublic{
			Type: gotpm.TPMAlgKeyedHash, NameAlg: gotpm.TPMAlgSHA256,
			ObjectAttributes: gotpm.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
			AuthPolicy:       gotpm.TPM2BDigest{Buffer: policy},
		}),
	}.Execute(r.d)
}

// unseal recovers the key, or says which PCRs are in the way.
func (d *device) unseal(s *sealed) (seal.Key, error) {
	root, err := d.loadRoot(s.srk)
	if err != nil {
		return seal.Key{}, err
	}
	defer root.flush()
	object, err := gotpm.Load{
		ParentHandle: root.auth(),
		InPrivate:    gotpm.TPM2BPrivate{Buffer: s.private},
		InPublic:     gotpm.BytesAs2B[gotpm.TPMTPublic](s.public),
	}.Execute(d)
	if err != nil {
		return seal.Key{}, loadError(err)
	}
	defer d.flush(object.ObjectHandle)
	k, err := root.unsealObject(s, object)
	if errors.Is(err, gotpm.TPMRCPolicyFail) {
		return seal.Key{}, root.whatChanged(s)
	}
	return k, err
}

// loadError tells a sealed object that the TPM does not take from a TPM that cannot take any now.
func loadError(err error) error {
	var fmt1 gotpm.TPMFmt1Error
	if errors.As(err, &fmt1) {
		return fmt.Errorf("%w (%w)", ErrObject, err)
	}
	return fmt.Errorf("loading the sealed object: %w", err)
}

// policyTries bounds how often a policy session is made anew because a PCR changed under it.
const policyTries = 3

func (r *root) unsealObject(s *sealed, object *gotpm.LoadResponse) (k seal.Key, err error) {
	for range policyTries {
		k, err = r.unsealOnce(s, object)
		if !errors.Is(err, gotpm.TPMRCPCRChanged) {
			break
		}
	}
	return k, err
}

func (r *root) unsealOnce(s *sealed, object *gotpm.LoadResponse) (seal.Key, error) {
	session, done, err := gotpm.PolicySession(r.d, sessionHash, nonceSize, r.salted(gotpm.AESEncryption(aesBits, gotpm.EncryptOut))...)
	if err != nil {
		return seal.Key{}, fmt.Errorf("starting a policy session: %w", err)
	}
	defer done()
	if _, err := (gotpm.PolicyPCR{PolicySession: session.Handle(), Pcrs: s.pcrs.list(s.pcrs.pcrs)}).Execute(r.d); err != nil {
		return seal.Key{}, fmt.Errorf("binding the session to PCRs: %w", err)
	}
	res, err := gotpm.Unseal{ItemHandle: gotpm.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: session}}.Execute(r.d)
	if err != nil {
		return seal.Key{}, fmt.Errorf("unsealing: %w", err)
	}
	defer clear(res.OutData.Buffer)
	return seal.NewKey(res.OutData.Buffer)
}

// whatChanged compares the PCRs with those of the enrolment.
func (r *root) whatChanged(s *sealed) error {
	now, err := r.readPCRs(s.pcrs)
	if err != nil {
		return err
	}
	changed := &PCRChangedError{Bank: s.pcrs.bank}
	for i, pcr := range s.pcrs.pcrs {
		if !bytes.Equal(now[i], s.values[i]) {
			changed.Changes = append(changed.Changes, PCRChange{PCR: pcr, From: s.values[i], To: now[i]})
		}
	}
	if len(changed.Changes) == 0 {
		return ErrPolicy
	}
	return changed
}
